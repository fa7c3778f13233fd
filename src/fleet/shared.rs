//! [`Shared`]: what the members of a fleet in one process have in common, and the task that watches the store for them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use tokio::{
    runtime::Handle,
    sync::{Mutex as AsyncMutex, Notify},
    task::AbortHandle,
};

use super::{
    Revision,
    client::{Client, Opened, Unavailable, Written},
    member::Member,
    news::{Item, News},
    record::Print,
    seal::SealError,
};
use crate::{
    error::BoxError,
    telemetry::event,
    util::timer::{sleep, timeout},
};

/// How many writes of news are tried at a time, as other members may be faster.
const MAX_CONFLICTS: usize = 64;

/// How long [`Shared::leave`] waits for exchanges of refresh tokens, which take no longer.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2 * 60);

/// How many items wait for the store at most.
const MAX_UNSAID: usize = 64;

/// How a fleet behaves.
#[derive(Clone, Copy)]
pub(super) struct Options {
    pub(super) lease: Duration,
    pub(super) login_lease: Duration,
    pub(super) news_interval: Duration,
}

/// What the members of a fleet in one process have in common.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) client: Client,
    pub(super) options: Options,
    /// By the hash of their names.
    members: Mutex<Members>,
    heard: AsyncMutex<Heard>,
    watcher: Mutex<Option<AbortHandle>>,
    /// How often the store was checked.
    checks: AtomicUsize,
    is_leaving: AtomicBool,
    /// Woken when a lease ends.
    pub(super) left: Notify,
}

#[derive(Default)]
struct Members {
    by_name: HashMap<Print, Vec<Weak<Member>>>,
    count: usize,
    /// When dead ones are removed next.
    sweep_at: usize,
}

#[derive(Default)]
struct Heard {
    news: News,
    revision: Option<Revision>,
    /// Items that the store does not have yet.
    unsaid: Vec<Item>,
    /// Whether what the store holds is sealed with another key, or in a newer format, and must not be replaced.
    is_foreign: bool,
    /// Whether it is sealed with a former key, so that members that have the current one alone cannot read it.
    is_former: bool,
}

impl Shared {
    pub(super) fn new(name: String, client: Client, options: Options) -> Self {
        Self {
            name,
            client,
            options,
            members: Mutex::default(),
            heard: AsyncMutex::default(),
            watcher: Mutex::default(),
            checks: AtomicUsize::new(0),
            is_leaving: AtomicBool::new(false),
            left: Notify::new(),
        }
    }

    /// The store's key for a credential, and the hash in it.
    pub(super) fn key(&self, credential: &str) -> (String, Print) {
        let name = Print::of(format!("{}\0{credential}", self.name).as_bytes());
        (format!("selam:{}:{}", self.name, BASE64_URL_SAFE_NO_PAD.encode(name.0)), name)
    }

    fn news_key(&self) -> String {
        format!("selam:{}:news", self.name)
    }

    pub(super) fn add(&self, member: &Arc<Member>) {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.by_name.entry(member.name).or_default().push(Arc::downgrade(member));
        members.count += 1;
        if members.count > members.sweep_at {
            members.sweep();
            members.sweep_at = 64.max(members.count * 2);
        }
    }

    /// The members whose engines are in use.
    pub(super) fn members(&self) -> Vec<Arc<Member>> {
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        members.sweep();
        members.by_name.values().flatten().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.is_leaving.load(Ordering::Acquire)
    }

    /// Stops claiming leases, ends those that can end, and waits for the others.
    pub(super) async fn leave(&self) {
        self.is_leaving.store(true, Ordering::Release);
        for member in self.members() {
            member.leave().await;
        }
        let exchanges = async {
            loop {
                let left = self.left.notified();
                if self.members().iter().all(|member| !member.has_login || member.lead().is_none()) {
                    return;
                }
                left.await;
            }
        };
        let _ = timeout(LEAVE_PATIENCE, exchanges).await;
    }

    /// Tells all members of the fleet, those of this process at once.
    pub(super) async fn announce(&self, item: Item) -> Result<(), BoxError> {
        self.tell(&item);
        let mut heard = self.heard.lock().await;
        heard.unsaid.truncate(MAX_UNSAID - 1);
        heard.unsaid.push(item);
        // If it fails, the watcher tries again.
        self.say(&mut heard).await?;
        match heard.unsaid.is_empty() {
            true => Ok(()),
            false => Err("the fleet's news cannot be written now".into()),
        }
    }

    /// Adds to the news what is not in the store yet.
    async fn say(&self, heard: &mut Heard) -> Result<(), Unavailable> {
        for _ in 0..MAX_CONFLICTS {
            let Some(item) = heard.unsaid.last().copied().filter(|_| !heard.is_foreign) else { break };
            let news = heard.news.with(item);
            match self.put(heard, &news).await? {
                Written::Done(revision) => {
                    (heard.news, heard.revision) = (news, Some(revision));
                    heard.unsaid.pop();
                }
                Written::Conflict(found) => self.hear(heard, found),
            }
        }
        Ok(())
    }

    async fn put(&self, heard: &Heard, news: &News) -> Result<Written, Unavailable> {
        // A list of numbers and strings always serializes.
        let bytes = serde_json::to_vec(news).unwrap_or_default();
        self.client.put(&self.news_key(), heard.revision, &bytes, None, false).await
    }

    /// Tells the members what is new.
    fn hear(&self, heard: &mut Heard, found: Option<Opened>) {
        let Some(Opened { revision, content, is_former, .. }) = found else {
            heard.revision = None;
            heard.is_foreign = false;
            return;
        };
        let foreign = content.as_ref().err().copied().filter(|error| *error != SealError::Corrupt);
        if let Some(error) = foreign.filter(|_| !heard.is_foreign) {
            event::fleet_record_unreadable(error.label());
        }
        heard.is_foreign = foreign.is_some();
        heard.is_former = is_former && foreign.is_none();
        if heard.revision.replace(revision) == Some(revision) {
            return;
        }
        let Some(news) = content.ok().and_then(|bytes| serde_json::from_slice::<News>(&bytes).ok()) else {
            return;
        };
        news.items.iter().filter(|item| !heard.news.items.contains(item)).for_each(|item| self.tell(item));
        heard.news = news;
    }

    fn tell(&self, item: &Item) {
        let members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        let named = members.by_name.get(&item.name).cloned().unwrap_or_default();
        drop(members);
        named.iter().filter_map(Weak::upgrade).for_each(|member| member.hear(item));
    }

    /// Starts the task that watches the store, unless it runs.
    pub(super) fn watch(self: &Arc<Self>) {
        let mut watcher = self.watcher();
        if watcher.as_ref().is_none_or(AbortHandle::is_finished)
            && let Ok(runtime) = Handle::try_current()
        {
            *watcher = Some(runtime.spawn(watch(Arc::downgrade(self))).abort_handle());
        }
    }

    fn watcher(&self) -> MutexGuard<'_, Option<AbortHandle>> {
        self.watcher.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the news, and puts back what the store has lost. Fails if the store does.
    async fn check(&self) -> Result<(), Unavailable> {
        let mut heard = self.heard.lock().await;
        let before = heard.news.clone();
        let found = self.client.get(&self.news_key()).await?;
        self.hear(&mut heard, found);
        let is_behind = !heard.is_foreign && (heard.revision.is_none() || heard.news.count < before.count);
        if is_behind {
            // The first member of the fleet begins the record, or the store has lost it.
            if heard.news.count < before.count {
                heard.news = before;
            }
            let news = heard.news.clone();
            match self.put(&heard, &news).await? {
                Written::Done(revision) => heard.revision = Some(revision),
                Written::Conflict(found) => self.hear(&mut heard, found),
            }
        }
        if heard.is_former && !is_behind {
            let news = heard.news.clone();
            if let Written::Done(revision) = self.put(&heard, &news).await? {
                (heard.revision, heard.is_former) = (Some(revision), false);
            }
        }
        self.say(&mut heard).await?;
        drop(heard);
        let members = self.members();
        // A store that was rolled back need not have lost news. So that no spent refresh token is spent again, one login
        // after the other is looked at.
        let logins = members.iter().filter(|member| member.has_login).collect::<Vec<_>>();
        let turn = self.checks.fetch_add(1, Ordering::Relaxed) % logins.len().max(1);
        let checked = logins.get(turn).copied();
        for member in &members {
            let looks = is_behind || checked.is_some_and(|checked| Arc::ptr_eq(checked, member));
            if looks || member.is_unsaved() {
                // It is tried again in a while, or when the engine asks.
                let _ = member.mend(looks).await;
            }
        }
        Ok(())
    }
}

impl Members {
    fn sweep(&mut self) {
        self.by_name.retain(|_, members| {
            members.retain(|member| member.upgrade().is_some_and(|member| member.is_in_use()));
            !members.is_empty()
        });
        self.count = self.by_name.values().map(Vec::len).sum();
    }
}

/// Watches the store until no engine is left.
async fn watch(shared: Weak<Shared>) {
    while let Some(interval) = shared.upgrade().map(|fleet| fleet.options.news_interval) {
        // Not all members at the same instant.
        sleep(interval.mul_f64(0.8 + fastrand::f64() / 5.0)).await;
        let Some(fleet) = shared.upgrade() else { return };
        if fleet.members().is_empty() {
            return;
        }
        // While the store fails, there is nothing to do.
        let _ = fleet.check().await;
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher().take() {
            watcher.abort();
        }
    }
}
