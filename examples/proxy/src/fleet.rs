//! The fleet in which replicas of the proxy share their JWTs: [`join`].

use std::{fmt, fs, path::Path, time::Duration};

use redis::{
    Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisError, TlsCertificates,
    aio::{ConnectionManager, ConnectionManagerConfig},
    io::tcp::TcpSettings,
};
use secrecy::{ExposeSecret, SecretString};
use tokio_rustls::rustls::crypto::ring;
use tower_selam::{
    BoxError,
    fleet::{Fleet, FleetBuilder, RedisStore, SealingKey},
};

use crate::{config::Error, upstream};

/// The variable with the store's URL, which may hold a password.
pub const STORE: &str = "SELAM_FLEET_STORE";

pub const FLEET: &str = "--fleet";
pub const KEY_FILE: &str = "--fleet-key-file";

/// How long it may take to connect to the store. The library's calls give up sooner, so that requests do not wait for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// When a connection that leads nowhere is given up. The library has stopped using it by then.
#[cfg(target_os = "linux")]
const GIVE_UP_AFTER: Duration = Duration::from_secs(5);

/// The URL of a Redis or Valkey server. Never shown, because it may hold a password.
#[derive(Clone)]
pub struct Store(ConnectionInfo);

impl Store {
    /// # Errors
    ///
    /// The URL is not that of a Redis or Valkey server.
    pub fn parse(url: &str) -> Result<Self, Error> {
        let invalid = Error::for_flag(
            STORE,
            "must be the URL of Redis or Valkey: redis://HOST:PORT, rediss://HOST:PORT for TLS, or unix:///PATH",
        );
        let info = url.trim().into_connection_info().map_err(|_| invalid)?;
        // TLS without verification of the server.
        if matches!(info.addr(), ConnectionAddr::TcpTls { insecure: true, .. }) {
            return Err(Error::for_flag(
                STORE,
                "#insecure is not supported; --ca FILE trusts further authorities",
            ));
        }
        Ok(Self(info))
    }

    /// Connects when the store is first used, and again after a failure.
    fn connection(&self, ca: Option<&Path>) -> Result<ConnectionManager, Error> {
        let tcp = TcpSettings::default();
        #[cfg(target_os = "linux")]
        let tcp = tcp.set_user_timeout(GIVE_UP_AFTER);
        let info = self.0.clone().set_tcp_settings(tcp);
        let failed = |error: RedisError| Error::for_flag(STORE, error);
        let client = match info.addr() {
            ConnectionAddr::TcpTls { .. } => {
                // Reports an invalid file, and that there is none although the system has no authorities.
                upstream::tls(ca, true)?;
                // redis-rs takes the process's provider. Fails if there is one already.
                let _ = ring::default_provider().install_default();
                let root_cert = ca.and_then(|path| fs::read(path).ok());
                Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert })
            }
            _ => Client::open(info),
        };
        // The library decides when to try again.
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(CONNECT_TIMEOUT));
        ConnectionManager::new_lazy_with_config(client.map_err(failed)?, config).map_err(failed)
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store([redacted])")
    }
}

/// Joins the fleet `name`. Does not wait for its store, which may be unreachable. Must be called in a tokio runtime.
///
/// # Errors
///
/// The name, or a file, is invalid.
pub fn join(name: &str, store: &Store, key_file: &Path, ca: Option<&Path>) -> Result<Fleet, Error> {
    let invalid = |error: BoxError| Error::for_flag(KEY_FILE, format!("{}: {error}", key_file.display()));
    let mut keys = keys(key_file).map_err(invalid)?.into_iter();
    let key = keys.next().ok_or_else(|| invalid("contains no key".into()))?;
    let store = RedisStore::new(store.connection(ca)?);
    let fleet = keys.fold(Fleet::builder(name, store, key), FleetBuilder::with_former_key);
    fleet.build().map_err(|error| Error::for_flag(FLEET, error))
}

/// Reads the keys, one per line: the first seals, the others open.
fn keys(path: &Path) -> Result<Vec<SealingKey>, BoxError> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot be read: {}", error.kind()))?;
    let text = SecretString::from(text);
    let lines = text.expose_secret().lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(index, line)| {
        SealingKey::from_base64(line).map_err(|error| format!("line {}: {error}", index + 1).into())
    };
    lines.map(parse).collect()
}

/// Warns of a file with keys that every user of the machine can read.
pub fn warn_if_public(path: &Path) {
    use std::os::unix::fs::PermissionsExt;

    if fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o004 != 0) {
        tracing::warn!(file = %path.display(), "every user of this machine can read the fleet's keys");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_are_urls_of_redis() {
        for url in [
            "redis://store.internal",
            " redis://user:s3cr3t@store.internal:6380/2 ",
            "rediss://:s3cr3t@store.internal",
            "valkey://[::1]",
            "unix:///run/redis.sock?pass=s3cr3t",
            "redis+unix:///run/redis.sock",
        ] {
            let store = Store::parse(url).unwrap();
            assert_eq!(format!("{store:?}"), "Store([redacted])", "{url}");
        }
        for url in [
            "store.internal:6379",
            "http://user:s3cr3t@store.internal",
            "redis://user:s3cr3t@",
            "redis://user:s3cr3t@store.internal/s3cr3t",
            "rediss://user:s3cr3t@store.internal/#insecure",
            "s3cr3t",
        ] {
            let error = Store::parse(url).unwrap_err().to_string();
            assert!(error.starts_with("SELAM_FLEET_STORE: ") && !error.contains("s3cr3t"), "{error}");
        }
    }
}
