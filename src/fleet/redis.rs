//! [`RedisStore`]: the records of a fleet in Redis or Valkey.

use std::time::Duration;

use redis::{Cmd, Value, aio::ConnectionLike, cmd};

use super::{Entry, FleetStore, Put, Revision, Write};
use crate::error::BoxError;

/// Returns revision, value and age in milliseconds, or nil.
///
/// The age is computed here, so that no two machines compare their clocks.
const GET: &str = "\
local t = redis.call('TIME')
local e = redis.call('HMGET', KEYS[1], 'r', 'v', 'w')
if not e[1] then return false end
return {e[1], e[2], math.max(0, t[1] * 1000 + math.floor(t[2] / 1000) - e[3])}";

/// Returns 1 if it has written, otherwise what stands there. Arguments: the expected revision or nothing, the new revision,
/// the value, and for how many milliseconds it is kept, or nothing.
const PUT: &str = "\
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local e = redis.call('HMGET', KEYS[1], 'r', 'v', 'w')
if (e[1] or '') ~= ARGV[1] then
  return e[1] and {e[1], e[2], math.max(0, now - e[3])}
end
redis.call('HSET', KEYS[1], 'r', ARGV[2], 'v', ARGV[3], 'w', string.format('%.0f', now))
if ARGV[4] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
return 1";

/// Redis refuses an expiry beyond its clock. This is 34,000 years.
const MAX_KEEP: u64 = 1 << 50;

/// A [`FleetStore`] in Redis 6.2 or later, or in Valkey, which is compatible with it.
///
/// Works over any asynchronous connection of the `redis` crate, also to a cluster or through Sentinel: clones of it share one
/// connection. It should reconnect, as `ConnectionManager` does.
///
/// ```no_run
/// use std::time::Duration;
///
/// use redis::{Client, aio::{ConnectionManager, ConnectionManagerConfig}};
/// use tower_selam::fleet::{Fleet, RedisStore, SealingKey};
///
/// # fn main() -> Result<(), tower_selam::BoxError> {
/// let client = Client::open("redis://selam-billing:password@redis.internal:6379")?;
/// // After an outage, connects again within a second.
/// let config = ConnectionManagerConfig::new().set_max_delay(Duration::from_secs(1));
/// // Connects when it is first used, so that the program starts without Redis.
/// let connection = ConnectionManager::new_lazy_with_config(client, config)?;
///
/// let key = SealingKey::from_file("/run/secrets/fleet-key")?;
/// let fleet = Fleet::new("billing", RedisStore::new(connection), key)?;
/// # Ok(())
/// # }
/// ```
///
/// Each record is a hash under its own key, `selam:{fleet}:{hash of the name}`. A call is one script with this key (`EVAL`), which
/// takes one round trip and also works in a cluster. Ages are measured by the server's clock.
///
/// # The server's settings
///
/// - **`maxmemory-policy noeviction`** (the default), or one of `volatile-*`. The policies `allkeys-*` evict logins.
/// - **`min-replicas-to-write 1`** if there is a replica. Otherwise a failover can lose the last write. Members put it back,
///   unless they have all ended by then; a lost refresh token needs a new login.
/// - **Persistence** (`appendonly yes`) if logins are to survive a restart of the server and of all members.
/// - **A user without other rights**:
///
/// ```text
/// ACL SETUSER selam-billing on >password resetkeys ~selam:billing:* resetchannels -@all +eval +time +hmget +hset +pexpire +persist
/// ```
///
/// The connection must lead to the primary: a replica refuses writes, and may be behind.
#[derive(Clone)]
pub struct RedisStore<C>(C);

impl<C> RedisStore<C> {
    /// Keeps the records on the server that `connection` leads to.
    #[must_use]
    pub fn new(connection: C) -> Self {
        Self(connection)
    }
}

impl<C: ConnectionLike + Clone + Send + Sync + 'static> RedisStore<C> {
    async fn eval(&self, command: &mut Cmd) -> Result<Value, BoxError> {
        Ok(command.query_async(&mut self.0.clone()).await?)
    }
}

impl<C: ConnectionLike + Clone + Send + Sync + 'static> FleetStore for RedisStore<C> {
    async fn get(&self, key: &str) -> Result<Option<Entry>, BoxError> {
        entry(self.eval(cmd("EVAL").arg(GET).arg(1).arg(key)).await?)
    }

    async fn put(&self, key: &str, write: Write<'_>) -> Result<Put, BoxError> {
        let expected = write.expected.as_ref().map_or(&[][..], |revision| revision.as_bytes());
        let keep = write.keep.map(|keep| u64::try_from(keep.as_millis()).unwrap_or(u64::MAX));
        // An expiry of zero would remove the entry at once.
        let keep = keep.map(|keep| keep.clamp(1, MAX_KEEP).to_string()).unwrap_or_default();
        let mut command = cmd("EVAL");
        command.arg(PUT).arg(1).arg(key).arg(expected);
        command.arg(write.revision.as_bytes()).arg(write.value).arg(keep);
        match self.eval(&mut command).await? {
            Value::Int(1) => Ok(Put::Done),
            found => Ok(Put::Conflict(entry(found)?)),
        }
    }
}

/// Reads what a script returned.
fn entry(found: Value) -> Result<Option<Entry>, BoxError> {
    let found: Option<(Vec<u8>, Vec<u8>, u64)> = redis::from_redis_value(found)?;
    let Some((revision, value, age)) = found else { return Ok(None) };
    let revision = revision.try_into().map_err(|_| "the hash was not written by a fleet")?;
    Ok(Some(Entry { revision: Revision::from_bytes(revision), value, age: Duration::from_millis(age) }))
}

opaque_debug!(RedisStore<C>);
