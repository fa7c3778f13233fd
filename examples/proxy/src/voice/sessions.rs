//! The open sessions of the voice agent, and whose they are: [`Sessions`].

use std::{
    borrow::Cow,
    collections::HashMap,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use serde_json::Value;
use tokio::time::{self, Instant};
use tower_selam::{Subject, inbound::EchoMask};

use super::packet::{Fault, Packet, SEPARATOR, Side, parse, parse_in_body};
use crate::{
    callers::{Identity, Name},
    metrics,
};

/// How many sessions there may be. Beyond that, the one that has been idle for longest is forgotten.
const MAX_SESSIONS: usize = 10_000;

/// The bounds for how long a session is remembered without a request: as long as the API waits for an answer to a ping.
const MIN_IDLE: Duration = Duration::from_secs(10);
const MAX_IDLE: Duration = Duration::from_secs(300);

/// How often idle sessions are forgotten.
const SWEEP_EVERY: Duration = Duration::from_secs(10);

/// The longest id of a session.
const MAX_ID: usize = 128;

/// Every session that was opened through this proxy. A request for another one is refused, and so is one of another caller.
#[derive(Debug)]
pub struct Sessions {
    open: Mutex<HashMap<String, Arc<Session>>>,
    most: usize,
}

/// Who opened a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The name of a client token.
    Caller(Name),
    /// A user of the app, whose group may change.
    User(Subject),
}

impl From<&Identity> for Owner {
    fn from(identity: &Identity) -> Self {
        match &identity.user {
            Some(user) => Self::User(user.subject.clone()),
            None => Self::Caller(identity.name.clone()),
        }
    }
}

/// One session.
#[derive(Debug)]
pub struct Session {
    id: String,
    owner: Owner,
    idle: Duration,
    used_at: Mutex<Instant>,
    /// Lives on a WebSocket, and takes no other requests.
    is_on_websocket: AtomicBool,
    /// How many announced attachments each side still has to send.
    attachments: [Mutex<usize>; 2],
    /// Masks the credentials of the handshake.
    mask: EchoMask,
}

/// A session with a request or a WebSocket. It is not idle until this is dropped.
#[derive(Clone, Debug)]
pub struct InUse(Arc<Session>);

impl Sessions {
    /// Creates the table, and a task that forgets idle sessions.
    pub fn new() -> Arc<Self> {
        let sessions = Arc::new(Self { open: Mutex::default(), most: MAX_SESSIONS });
        let weak = Arc::downgrade(&sessions);
        tokio::spawn(async move {
            let mut ticks = time::interval(SWEEP_EVERY);
            loop {
                ticks.tick().await;
                let Some(sessions) = weak.upgrade() else { return };
                sessions.sweep();
            }
        });
        sessions
    }

    /// Adds the session that the API described with `json` in its open packet; `None` if that is not valid, or the table is full.
    pub fn open(&self, owner: &Owner, json: &str, mask: EchoMask) -> Option<InUse> {
        let json: Value = serde_json::from_str(json).ok()?;
        let is_id = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        let id =
            json["sid"].as_str().filter(|id| (1..=MAX_ID).contains(&id.len()) && id.bytes().all(is_id))?;
        let millis = ["pingInterval", "pingTimeout"].map(|name| json[name].as_u64().unwrap_or_default());
        let idle = Duration::from_millis(millis[0].saturating_add(millis[1])).clamp(MIN_IDLE, MAX_IDLE);
        let session = Arc::new(Session {
            id: id.to_owned(),
            owner: owner.clone(),
            idle,
            used_at: Mutex::new(Instant::now()),
            is_on_websocket: AtomicBool::new(false),
            attachments: Default::default(),
            mask,
        });
        let mut open = self.lock();
        if open.contains_key(id) || (open.len() >= self.most && !forget_idlest(&mut open)) {
            return None;
        }
        open.insert(id.to_owned(), Arc::clone(&session));
        metrics::set_voice_sessions(open.len());
        Some(InUse(session))
    }

    /// Returns the session with this id if it belongs to this caller.
    pub fn find(&self, id: &str, caller: &Owner) -> Option<InUse> {
        let open = self.lock();
        let session = open.get(id).filter(|session| session.owner == *caller && session.is_alive());
        session.cloned().map(InUse)
    }

    /// Forgets a session that has ended.
    pub fn remove(&self, session: &Session) {
        let mut open = self.lock();
        open.remove(&session.id);
        metrics::set_voice_sessions(open.len());
    }

    fn sweep(&self) {
        let mut open = self.lock();
        open.retain(|_, session| session.is_alive());
        metrics::set_voice_sessions(open.len());
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Session>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes room for a session; false if all are in use.
fn forget_idlest(open: &mut HashMap<String, Arc<Session>>) -> bool {
    let idle = open.values().filter(|session| !session.is_used());
    let Some(idlest) = idle.min_by_key(|session| *session.used_at()).map(|session| session.id.clone()) else {
        return false;
    };
    open.remove(&idlest).is_some()
}

impl Session {
    fn used_at(&self) -> MutexGuard<'_, Instant> {
        self.used_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request or a WebSocket has the session: the table itself has one reference.
    fn is_used(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1
    }

    fn is_alive(self: &Arc<Self>) -> bool {
        self.is_used() || self.used_at().elapsed() < self.idle
    }

    /// Moves the session to a WebSocket, once.
    ///
    /// # Errors
    ///
    /// It is on one already.
    pub fn move_to_websocket(&self) -> Result<(), Fault> {
        let was_there = self.is_on_websocket.swap(true, Relaxed);
        if was_there { Err(Fault::Malformed) } else { Ok(()) }
    }

    pub fn is_on_websocket(&self) -> bool {
        self.is_on_websocket.load(Relaxed)
    }

    fn attachments(&self, side: Side) -> MutexGuard<'_, usize> {
        self.attachments[side as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a text packet that `side` sent.
    pub fn check<'a>(&self, side: Side, text: &'a str) -> Result<Packet<'a>, Fault> {
        let packet = parse(side, text)?;
        count(packet, &mut self.attachments(side))?;
        Ok(packet)
    }

    /// Checks a binary packet that `side` sent.
    pub fn check_binary(&self, side: Side) -> Result<(), Fault> {
        count(Packet::Binary, &mut self.attachments(side))
    }

    /// Checks every packet in a body that `side` sent, and joins what `pass` makes of them. If one may not pass, none does, and
    /// their attachments are not announced.
    pub fn check_body<'a>(
        &self,
        side: Side,
        body: &'a [u8],
        mut pass: impl FnMut(Packet<'a>, &'a str) -> Result<Cow<'a, str>, Fault>,
    ) -> Result<String, Fault> {
        let body = std::str::from_utf8(body).map_err(|_| Fault::Malformed)?;
        let mut attachments = self.attachments(side);
        let mut left = *attachments;
        let mut checked = String::with_capacity(body.len());
        for (number, text) in body.split(SEPARATOR).enumerate() {
            if number > 0 {
                checked.push(SEPARATOR);
            }
            let packet = parse_in_body(side, text)?;
            count(packet, &mut left)?;
            checked.push_str(&pass(packet, text)?);
        }
        *attachments = left;
        Ok(checked)
    }

    pub fn mask(&self) -> &EchoMask {
        &self.mask
    }
}

/// Counts the attachments that are left. A binary packet must have been announced: a parser that puts whole packets into binary
/// ones could otherwise name any namespace.
fn count(packet: Packet<'_>, left: &mut usize) -> Result<(), Fault> {
    *left = match packet {
        Packet::Binary => left.checked_sub(1).ok_or(Fault::Attachment)?,
        Packet::Message { attachments } if *left == 0 => attachments,
        Packet::Connect(_) if *left == 0 => 0,
        Packet::Message { .. } | Packet::Connect(_) => return Err(Fault::Attachment),
        _ => return Ok(()),
    };
    Ok(())
}

impl Deref for InUse {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        *self.0.used_at() = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn caller(name: &str) -> Owner {
        Owner::Caller(name.into())
    }

    fn open_packet(id: &str) -> String {
        format!(r#"{{"sid":"{id}","pingInterval":25000,"pingTimeout":20000}}"#)
    }

    fn open(sessions: &Sessions, owner: &str, id: &str) -> Option<InUse> {
        sessions.open(&caller(owner), &open_packet(id), EchoMask::default())
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_belong_to_their_callers() {
        let sessions = Sessions::new();
        let (web, app) = (caller("web"), caller("app"));
        drop(open(&sessions, "web", "a").unwrap());
        assert!(sessions.find("a", &web).is_some());
        assert!(sessions.find("a", &app).is_none() && sessions.find("b", &web).is_none());
        assert!(open(&sessions, "app", "a").is_none(), "an id is given once");
        assert!(sessions.find("a", &app).is_none());
        sessions.remove(&sessions.find("a", &web).unwrap());
        assert!(sessions.find("a", &web).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn idle_sessions_are_forgotten() {
        let sessions = Sessions::new();
        let (web, second) = (caller("web"), Duration::from_secs(1));
        let used = open(&sessions, "web", "used").unwrap();
        drop(open(&sessions, "web", "idle").unwrap());
        for _ in 0..2 {
            time::sleep(44 * second).await;
            drop(sessions.find("idle", &web).unwrap());
        }
        time::sleep(46 * second).await;
        assert!(sessions.find("idle", &web).is_none());
        time::sleep(SWEEP_EVERY).await;
        assert_eq!(sessions.lock().len(), 1, "a session that is in use is kept");
        drop(used);
        time::sleep(46 * second + SWEEP_EVERY).await;
        assert_eq!(sessions.lock().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded() {
        let sessions = Sessions { open: Mutex::default(), most: 3 };
        let first = open(&sessions, "web", "first").unwrap();
        for id in ["second", "third", "fourth"] {
            drop(open(&sessions, "web", id).unwrap());
            time::sleep(Duration::from_secs(1)).await;
        }
        let web = caller("web");
        let found = ["first", "second", "third", "fourth"].map(|id| sessions.find(id, &web));
        assert_eq!(found.each_ref().map(Option::is_some), [true, false, true, true]);
        assert!(open(&sessions, "web", "fifth").is_none(), "all are in use");
        drop((first, found));
        assert!(open(&sessions, "web", "fifth").is_some());
    }

    #[tokio::test]
    async fn open_packets_are_checked() {
        let sessions = Sessions::new();
        let long = "x".repeat(129);
        for json in [
            "",
            "{}",
            r#"{"sid":1}"#,
            r#"{"sid":""}"#,
            r#"{"sid":"a b"}"#,
            r#"{"sid":"é"}"#,
            &open_packet(&long),
        ] {
            assert!(sessions.open(&caller("web"), json, EchoMask::default()).is_none(), "{json}");
        }
        for (json, idle) in [
            (r#"{"sid":"a"}"#, MIN_IDLE),
            (r#"{"sid":"b","pingInterval":18446744073709551615,"pingTimeout":1}"#, MAX_IDLE),
            (&open_packet("c"), Duration::from_secs(45)),
        ] {
            assert_eq!(sessions.open(&caller("web"), json, EchoMask::default()).unwrap().idle, idle);
        }
    }

    #[tokio::test]
    async fn a_session_moves_once() {
        let session = open(&Sessions::new(), "web", "a").unwrap();
        assert!(!session.is_on_websocket());
        assert_eq!(session.move_to_websocket(), Ok(()));
        assert_eq!(session.move_to_websocket(), Err(Fault::Malformed));
        assert!(session.is_on_websocket());
    }

    #[tokio::test]
    async fn attachments_must_be_announced() {
        let session = open(&Sessions::new(), "web", "a").unwrap();
        let event = "452-/v1/audio/agent,[]";
        for side in [Side::Caller, Side::Api] {
            assert_eq!(session.check_binary(side), Err(Fault::Attachment));
            assert!(session.check(side, event).is_ok());
            for other in [event, "42/v1/audio/agent,[]", "40/v1/audio/agent,"] {
                assert_eq!(session.check(side, other), Err(Fault::Attachment), "the attachments are missing");
            }
            let mut pass = |_, text| Ok(Cow::Borrowed(text));
            assert_eq!(session.check_body(side, b"bAAAA", &mut pass).as_deref(), Ok("bAAAA"));
            assert!(session.check(side, "1").is_ok(), "a control packet may come in between");
            assert_eq!(session.check_binary(side), Ok(()));
            assert_eq!(session.check_binary(side), Err(Fault::Attachment));
            assert!(session.check(side, "42/v1/audio/agent,[]").is_ok());
            // Nothing of a body that is refused is announced.
            let body = format!("{event}\x1ebAAAA\x1e42/other,[]");
            assert_eq!(session.check_body(side, body.as_bytes(), &mut pass), Err(Fault::Namespace));
            assert_eq!(session.check_binary(side), Err(Fault::Attachment));
            let no = |_, _| Err(Fault::Malformed);
            assert_eq!(session.check_body(side, event.as_bytes(), no), Err(Fault::Malformed));
            assert_eq!(session.check_binary(side), Err(Fault::Attachment));
        }
    }

    proptest! {
        /// Never more binary packets than were announced.
        #[test]
        fn binary_packets_are_counted(steps in proptest::collection::vec(0..4_usize, 0..40)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _guard = runtime.enter();
            let session = open(&Sessions::new(), "web", "a").unwrap();
            let mut left = 0_usize;
            for step in steps {
                if step == 0 {
                    prop_assert_eq!(session.check_binary(Side::Caller).is_ok(), left > 0);
                    left = left.saturating_sub(1);
                } else {
                    let event = format!("45{step}-/v1/audio/agent,[]");
                    prop_assert_eq!(session.check(Side::Caller, &event).is_ok(), left == 0);
                    left = if left == 0 { step } else { left };
                }
            }
        }
    }
}
