//! [`Member`]: one credential of a fleet in one process. Carries out what the protocol decides.

use std::{
    error::Error,
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use tokio::{runtime::Handle, sync::Mutex as AsyncMutex, task::AbortHandle};

use super::{
    Revision,
    client::{Opened, Unavailable, Written},
    news::Item,
    protocol::{Ask, Asker, Fetch, Step, Worth, extend, next, reclaim, release, settle, with_child},
    record::{Print, Record, SharedLogin, SharedToken},
    seal::{SealError, random},
    shared::Shared,
};
use crate::{
    credential::Token,
    oauth::RefreshToken,
    source::{EngineHandle, SourceError},
    telemetry::event,
    util::{
        clock::{Clock, Time, now},
        timer::sleep,
    },
};

/// How often a write is tried again because another member was faster.
const MAX_CONFLICTS: usize = 32;

/// No fetch takes longer, so no lease is extended beyond.
const MAX_LEAD: Duration = Duration::from_secs(15 * 60);

/// One credential of a fleet in one process.
pub(super) struct Member {
    pub(super) fleet: Arc<Shared>,
    key: String,
    /// The hashed name, as news have it.
    pub(super) name: Print,
    pub(super) identity: OnceLock<Print>,
    /// Whether the credential is fetched with a refresh token that the fleet shares.
    pub(super) has_login: bool,
    /// The refresh token to begin with if the fleet has never had one.
    pub(super) initial: OnceLock<RefreshToken>,
    state: AsyncMutex<State>,
    engine: OnceLock<EngineHandle<Token>>,
    lead: Mutex<Weak<Lead>>,
    /// The epoch of the newest record seen.
    epoch: AtomicU64,
    /// Changes when the login is replaced by another member.
    pub(super) changes: AtomicU64,
    /// Whether the store does not hold what this member knows.
    is_unsaved: AtomicBool,
}

/// What a member knows of the record.
#[derive(Default)]
struct State {
    /// The newest record seen, or made and not saved.
    record: Record,
    /// When `record` was as it is here.
    at: Option<Time>,
    /// The revision that the store has, as far as is known.
    revision: Option<Revision>,
    /// Why what stands in the store is not to be touched.
    unreadable: Option<SealError>,
    /// A refresh token that the store does not hold yet, and the one it was issued for.
    child: Option<[RefreshToken; 2]>,
    /// Since when the store has held nothing.
    empty_since: Option<Time>,
}

/// What to do for the engine.
pub(super) enum Decision {
    /// Fetch, and settle.
    Lead(Arc<Lead>),
    /// Do as the protocol says; never [`Step::Claim`].
    Step(Step),
}

/// Why a record cannot be used or changed.
#[derive(Debug)]
pub(super) enum RecordError {
    Unavailable(Unavailable),
    Unreadable(SealError),
    /// Other members kept changing the record.
    Contended,
    /// This member has left the fleet, and claims no more leases.
    Left,
    /// Another member has the lease now.
    Lost,
}

impl Member {
    pub(super) fn new(fleet: &Arc<Shared>, name: &str, has_login: bool) -> Arc<Self> {
        let (key, name) = fleet.key(name);
        Arc::new(Self {
            fleet: Arc::clone(fleet),
            key,
            name,
            identity: OnceLock::new(),
            has_login,
            initial: OnceLock::new(),
            state: AsyncMutex::default(),
            engine: OnceLock::new(),
            lead: Mutex::default(),
            epoch: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            is_unsaved: AtomicBool::new(false),
        })
    }

    pub(super) fn attach(&self, engine: EngineHandle<Token>) {
        let _ = self.engine.set(engine);
    }

    fn asker(&self, id: Print) -> Asker {
        let identity = self.identity.get().copied();
        Asker { id, identity, has_login: self.has_login, lease: self.lease() }
    }

    /// Whether an engine can still ask for the credential, or a refresh token is being spent for one that is gone.
    pub(super) fn is_in_use(&self) -> bool {
        self.engine.get().is_none_or(EngineHandle::is_alive) || self.lead().is_some()
    }

    /// Decides what to do for the engine, and claims the lease if that is to fetch. `looks` reads the store first.
    pub(super) async fn decide(self: &Arc<Self>, ask: Ask, looks: bool) -> Result<Decision, RecordError> {
        // One for each lease, so that no fetch takes the lease of another one of this member for its own. Without random bits,
        // nothing can be sealed either.
        let asker = self.asker(Print(random().unwrap_or_default()));
        let decide = |record: &Record| next(record, ask, &asker, |token| self.worth(token));
        let mut state = self.state.lock().await;
        let remembered = decide(&state.record_at(Clock::default().now()));
        let looks = looks || state.unreadable.is_some() || self.fleet.is_leaving();
        let begins = self.initial.get().is_some() && state.record.generation == 0;
        if looks || begins || !matches!(remembered, Step::Claim(_)) {
            self.look(&mut state).await?;
        }
        if begins && self.may_be_put_back(&mut state) {
            return Ok(Decision::Step(Step::Follow));
        }
        let mut decided = None;
        let claimed = self.update(&mut state, |record| match decide(record) {
            Step::Claim(_) if self.fleet.is_leaving() => None,
            Step::Claim(claim) => Some(*claim),
            step => {
                decided = Some(step);
                None
            }
        });
        if claimed.await? {
            return Ok(Decision::Lead(Lead::begin(self, asker, state.record.generation, ask)));
        }
        let step = decided.ok_or(RecordError::Left)?;
        if self.is_unsaved() {
            self.save(&mut state).await?;
        }
        Ok(Decision::Step(step))
    }

    /// Tells all members of a rejected token, if `token` has replaced it.
    async fn announce_replaced(&self, ask: Ask, token: &SharedToken) {
        if let Ask::Rejected(refused) = ask
            && token.print() != refused
        {
            let item = Item { name: self.name, refused: Some(refused), epoch: 0 };
            // If it fails, it is tried again.
            let _ = self.fleet.announce(item).await;
        }
    }

    /// Remembers a token that was fetched without the store. The watcher saves it when the store is back.
    pub(super) async fn keep(&self, ask: Ask, token: SharedToken) {
        self.announce_replaced(ask, &token).await;
        let mut state = self.state.lock().await;
        let now = Clock::default().now();
        let mut record = state.record_at(now);
        record.generation += 1;
        record.token = Some(token);
        record.failure = None;
        self.remember(&mut state, record, now);
        self.set_unsaved(true);
    }

    /// Publishes how a fetch ended. Returns whether the record says so now; not if another member was faster.
    async fn settle(&self, leader: &Asker, base: u64, ask: Ask, fetch: &Fetch) -> bool {
        let mut state = self.state.lock().await;
        let edit = |record: &Record| settle(record, leader, base, ask, fetch);
        match self.update(&mut state, edit).await {
            Ok(settled) => settled,
            Err(_) => {
                let now = Clock::default().now();
                let settled = edit(&state.record_at(now));
                if let Some(record) = settled {
                    self.remember(&mut state, record, now);
                    self.set_unsaved(true);
                }
                true
            }
        }
    }

    /// The refresh token that the record holds, for the leader to spend. The claim has brought it, unless this `is_another`.
    pub(super) async fn login(
        &self,
        leader: Print,
        is_another: bool,
    ) -> Result<Option<RefreshToken>, RecordError> {
        let mut state = self.state.lock().await;
        if is_another {
            self.look(&mut state).await?;
            let reclaimed = self.update(&mut state, |record| reclaim(record, leader, self.lease())).await?;
            if !reclaimed {
                return Err(RecordError::Lost);
            }
        }
        let record = state.record_at(Clock::default().now());
        Ok(record.login.as_ref().and_then(SharedLogin::token))
    }

    /// Stores the refresh token `child`, which was issued for `spent`, unless the record has another login.
    pub(super) async fn save_login(
        &self,
        child: &RefreshToken,
        spent: &RefreshToken,
    ) -> Result<(), RecordError> {
        let mut state = self.state.lock().await;
        state.child = Some([spent.clone(), child.clone()]);
        self.set_unsaved(true);
        let saved = self.update(&mut state, |record| record.is_login(child).then(|| record.clone())).await?;
        if let Some(lead) = self.lead().filter(|_| saved) {
            lead.base.store(state.record.generation, Ordering::Release);
        }
        Ok(())
    }

    /// Puts what this member knows into the store if that is newer.
    pub(super) async fn mend(&self, looks: bool) -> Result<(), RecordError> {
        let mut state = self.state.lock().await;
        if looks {
            self.look(&mut state).await?;
        }
        if self.is_unsaved() { self.save(&mut state).await } else { Ok(()) }
    }

    async fn save(&self, state: &mut State) -> Result<(), RecordError> {
        let is_worth_it =
            |record: &Record| record.token.is_some() || record.login.is_some() || record.epoch > 0;
        let saved =
            self.update(state, |record| (self.is_unsaved() && is_worth_it(record)).then(|| record.clone()));
        if saved.await? {
            event::fleet_record_mended();
        }
        self.set_unsaved(false);
        Ok(())
    }

    /// Replaces the record by what `edit` makes of it.
    pub(super) async fn replace(&self, edit: impl Fn(&Record, u64) -> Record) -> Result<u64, RecordError> {
        let mut state = self.state.lock().await;
        self.update(&mut state, |record| Some(edit(record, millis()))).await?;
        Ok(state.record.generation)
    }

    /// Reads the record and how long ago it was written.
    pub(super) async fn read(&self) -> Result<Option<Record>, RecordError> {
        let mut state = self.state.lock().await;
        self.look(&mut state).await?;
        Ok(state.revision.map(|_| state.record_at(Clock::default().now())))
    }

    /// Ends a lease, unless a refresh token is being spent under it.
    pub(super) async fn leave(&self) {
        // A claim that is under way has ended.
        drop(self.state.lock().await);
        if let Some(lead) = self.lead().filter(|_| !self.has_login) {
            self.release(lead.asker.id).await;
        }
    }

    pub(super) fn lead(&self) -> Option<Arc<Lead>> {
        self.lead.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// Withdraws the credential that another member's news say has ended.
    pub(super) fn hear(&self, item: &Item) {
        let Some(engine) = self.engine.get() else { return };
        match item.refused {
            Some(refused) => engine.withdraw_if(|current| Print::from(current) == refused),
            None if self.epoch.load(Ordering::Acquire) < item.epoch => {
                self.changes.fetch_add(1, Ordering::AcqRel);
                engine.withdraw_if(|_| true);
            }
            None => {}
        }
    }

    pub(super) fn is_unsaved(&self) -> bool {
        self.is_unsaved.load(Ordering::Acquire)
    }

    fn set_unsaved(&self, is_unsaved: bool) {
        self.is_unsaved.store(is_unsaved, Ordering::Release);
    }

    async fn extend(&self, leader: Print) -> bool {
        let mut state = self.state.lock().await;
        let extended = self.update(&mut state, |record| extend(record, leader, self.lease())).await;
        // While the store fails, the lease may still hold.
        extended.unwrap_or(true)
    }

    async fn release(&self, leader: Print) {
        let mut state = self.state.lock().await;
        // If that fails, the lease lapses.
        let _ = self.update(&mut state, |record| release(record, leader)).await;
    }

    /// Whether the store holds nothing, but may have lost it a moment ago, so that other members are about to put it back.
    fn may_be_put_back(&self, state: &mut State) -> bool {
        if state.record.generation > 0 {
            return false;
        }
        let now = Clock::default().now();
        let since = *state.empty_since.get_or_insert(now);
        now.since(since) < self.fleet.options.news_interval * 2
    }

    async fn look(&self, state: &mut State) -> Result<(), RecordError> {
        let now = Clock::default().now();
        let found = self.fleet.client.get(&self.key).await.map_err(RecordError::Unavailable)?;
        self.absorb(state, found, now);
        state.unreadable.map_or(Ok(()), |error| Err(RecordError::Unreadable(error)))
    }

    /// Puts what `edit` makes of the record in its place, as often as another member interferes. Returns whether there was
    /// anything to put.
    async fn update(
        &self,
        state: &mut State,
        mut edit: impl FnMut(&Record) -> Option<Record>,
    ) -> Result<bool, RecordError> {
        for _ in 0..MAX_CONFLICTS {
            if let Some(error) = state.unreadable {
                return Err(RecordError::Unreadable(error));
            }
            let now = Clock::default().now();
            let mut record = state.record_at(now);
            if let Some([spent, child]) = &state.child {
                match with_child(&record, spent, child) {
                    Some(with_child) => record = with_child,
                    None => state.child = None,
                }
            }
            if let Some(initial) = self.initial.get().filter(|_| record.generation == 0) {
                record.login = Some(SharedLogin::new(initial));
            }
            let Some(mut edited) = edit(&record) else { return Ok(false) };
            edited.generation = edited.generation.max(1);
            let keep = edited.keep(edited.token.as_ref().and_then(|token| self.rest(token)));
            let client = &self.fleet.client;
            // A refresh token that only this member has is worth a call.
            let insists = state.child.is_some();
            let put = client.put(&self.key, state.revision, &edited.to_bytes(), keep, insists).await;
            match put.map_err(RecordError::Unavailable)? {
                Written::Done(revision) => {
                    state.revision = Some(revision);
                    state.child = None;
                    self.remember(state, edited, now);
                    self.set_unsaved(false);
                    return Ok(true);
                }
                Written::Conflict(found) => self.absorb(state, found, now),
            }
        }
        Err(RecordError::Contended)
    }

    /// Takes note of what the store holds. `now` is the time before it was asked.
    fn absorb(&self, state: &mut State, found: Option<Opened>, now: Time) {
        let was_unreadable = state.unreadable.take();
        let Some(Opened { revision, age, content, .. }) = found else {
            state.revision = None;
            self.set_unsaved(state.record.generation > 0);
            return;
        };
        // The same again, which has aged here already. The store's clock may have been set since.
        if state.revision.replace(revision) == Some(revision) {
            return;
        }
        let content = content.and_then(|bytes| Record::from_bytes(&bytes).ok_or(SealError::Corrupt));
        match content {
            Ok(found) if found.generation < state.record.generation => self.set_unsaved(true),
            Ok(found) => {
                let found = found.aged(age);
                let is_same_login = match (&state.record.login, &found.login) {
                    (Some(mine), Some(theirs)) => mine.is_same(theirs),
                    (mine, theirs) => mine.is_none() && theirs.is_none(),
                };
                if !is_same_login {
                    self.changes.fetch_add(1, Ordering::AcqRel);
                }
                self.remember(state, found, now);
                self.set_unsaved(state.child.is_some());
            }
            // Nothing is lost: the token can be fetched again.
            Err(SealError::Corrupt) if !self.has_login => self.set_unsaved(true),
            Err(error) => {
                if was_unreadable != Some(error) {
                    event::fleet_record_unreadable(error.label());
                }
                // So that the next look opens it again.
                state.revision = None;
                state.unreadable = Some(error);
            }
        }
    }

    fn remember(&self, state: &mut State, record: Record, now: Time) {
        // The tokens of an earlier login, or of one that has ended.
        if self.epoch.fetch_max(record.epoch, Ordering::AcqRel) < record.epoch
            && let Some(engine) = self.engine.get()
        {
            engine.withdraw_if(|_| true);
        }
        state.record = record;
        state.at = Some(now);
    }

    fn lease(&self) -> Duration {
        let options = &self.fleet.options;
        if self.has_login { options.login_lease } else { options.lease }
    }

    fn worth(&self, token: &SharedToken) -> Worth {
        let Some(fetched) = token.fetched() else { return Worth::Expired };
        if self.rest(token).is_some_and(|rest| rest.is_zero()) {
            return Worth::Expired;
        }
        let kept = self.engine.get().and_then(|engine| engine.would_keep(fetched)).unwrap_or(true);
        if kept { Worth::Fresh } else { Worth::Aging }
    }

    /// The rest of the lifetime of the fleet's token; `None` if nothing states it.
    pub(super) async fn token_rest(&self) -> Option<Duration> {
        let record = self.state.lock().await.record_at(Clock::default().now());
        record.token.as_ref().and_then(|token| self.rest(token))
    }

    /// The rest of a token's lifetime; `None` if nothing states it.
    fn rest(&self, token: &SharedToken) -> Option<Duration> {
        token.lifetime.or_else(|| {
            let expires_at = token.fetched()?.credential.expires_at()?;
            Some(expires_at.duration_since(now()).unwrap_or_default())
        })
    }
}

impl State {
    fn record_at(&self, now: Time) -> Record {
        let passed = self.at.map(|at| now.since(at).saturating_add(now.unseen_since(at)));
        self.record.aged(passed.unwrap_or_default())
    }
}

/// The time in milliseconds, with which logins begin and end.
fn millis() -> u64 {
    let time = now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The lease of a member, which is extended until it is settled or dropped.
pub(super) struct Lead {
    member: Arc<Member>,
    pub(super) asker: Asker,
    /// The generation that it was claimed at, or of the refresh token that was saved since.
    base: AtomicU64,
    ask: Ask,
    is_settled: AtomicBool,
    /// The task that extends the lease.
    extending: OnceLock<AbortHandle>,
    /// Whether the login was not loaded yet, so that the claim has just brought it.
    pub(super) is_new: AtomicBool,
}

impl Lead {
    fn begin(member: &Arc<Member>, asker: Asker, base: u64, ask: Ask) -> Arc<Self> {
        let lead = Arc::new(Self {
            member: Arc::clone(member),
            asker,
            base: base.into(),
            ask,
            is_settled: AtomicBool::new(false),
            extending: OnceLock::new(),
            is_new: AtomicBool::new(true),
        });
        *member.lead.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&lead);
        if let Ok(runtime) = Handle::try_current() {
            let _ = lead.extending.set(runtime.spawn(keep_extending(Arc::downgrade(&lead))).abort_handle());
        }
        lead
    }

    /// Publishes how the fetch ended. Returns whether the record says so now; not if another member was faster.
    pub(super) async fn settle(&self, fetch: &Fetch) -> bool {
        let base = self.base.load(Ordering::Acquire);
        let settled = self.member.settle(&self.asker, base, self.ask, fetch).await;
        self.is_settled.store(true, Ordering::Release);
        if let (true, Fetch::Done(token)) = (settled, fetch) {
            self.member.announce_replaced(self.ask, token).await;
        }
        settled
    }

    fn is_over(&self) -> bool {
        self.is_settled.load(Ordering::Acquire)
    }
}

/// Gives the lease back, also when the fetch is dropped.
impl Drop for Lead {
    fn drop(&mut self) {
        if let Some(extending) = self.extending.get() {
            extending.abort();
        }
        if !self.is_over()
            && let Ok(runtime) = Handle::try_current()
        {
            let (member, leader) = (Arc::clone(&self.member), self.asker.id);
            runtime.spawn(async move { member.release(leader).await });
        }
        self.member.fleet.left.notify_waiters();
    }
}

async fn keep_extending(lead: Weak<Lead>) {
    let Some(pause) = lead.upgrade().map(|lead| lead.member.lease() / 3) else { return };
    let mut extended = Duration::ZERO;
    while extended < MAX_LEAD {
        sleep(pause).await;
        extended += pause;
        let Some(lead) = lead.upgrade().filter(|lead| !lead.is_over()) else { return };
        if !lead.member.extend(lead.asker.id).await {
            return;
        }
    }
}

impl From<RecordError> for SourceError {
    fn from(error: RecordError) -> Self {
        match error {
            RecordError::Unavailable(error) => {
                let retry_after = error.retry_after;
                Self::transient(error).with_retry_after(retry_after)
            }
            RecordError::Unreadable(_) => Self::permanent(error),
            RecordError::Contended | RecordError::Left | RecordError::Lost => Self::transient(error),
        }
    }
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(error) => error.fmt(f),
            Self::Unreadable(SealError::UnknownKey) => {
                f.write_str("the fleet's record is sealed with a key that this member does not have")
            }
            Self::Unreadable(SealError::NewerFormat) => {
                f.write_str("a newer version of tower-selam wrote the fleet's record: update this member")
            }
            Self::Unreadable(SealError::Corrupt) => {
                f.write_str("the fleet's record was changed or moved: log in again, or restore it")
            }
            Self::Contended => f.write_str("other members of the fleet kept changing the record"),
            Self::Lost => f.write_str("another member of the fleet has the lease now"),
            Self::Left => f.write_str("this member has left the fleet, and spends no refresh token"),
        }
    }
}

impl Error for RecordError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Unavailable(error) => error.source(),
            Self::Unreadable(_) | Self::Contended | Self::Left | Self::Lost => None,
        }
    }
}
