//! Fleets within one process, in paused time: which member fetches, and what happens when members, stores and issuers fail.

mod line;
mod walk;

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use tower_selam::{
    AuthErrorKind, BoxError, PerSubject, RefreshPolicy, Refreshing, Subject, Token,
    fleet::{Fleet, FleetLogin, FleetStore, MemoryStore, SealingKey},
    oauth::{ClientAuth, OAuthSource, RefreshToken, TokenEndpoint},
    simulator::{Simulator, TokenFault},
    source::{Fetched, Reason, Source, SourceError},
};

use self::line::{Line, State};
use crate::{
    mint::{Answer, MINUTE, Mint, SECOND, clock, text},
    support::Body,
};

const URL: &str = "https://api.selamgpt.com/oauth/token";
const MILLI: Duration = Duration::from_millis(1);

fn key(byte: u8) -> SealingKey {
    SealingKey::new([byte; 32])
}

fn join(store: impl FleetStore) -> Fleet {
    Fleet::new("billing", store, key(1)).unwrap()
}

fn member(fleet: &Fleet, source: impl Source<Token>) -> Refreshing<Token> {
    Refreshing::new(fleet.share("selam", source))
}

/// Members with a connection each to one store.
fn members<const N: usize>(mint: &Mint) -> ([Refreshing<Token>; N], [Line; N], MemoryStore) {
    let store = MemoryStore::default();
    let lines = [(); N].map(|()| Line::new(&store));
    let members = std::array::from_fn(|index| member(&join(lines[index].clone()), mint.clone()));
    (members, lines, store)
}

async fn texts(members: &[Refreshing<Token>]) -> Vec<Result<String, AuthErrorKind>> {
    let calls = members.iter().map(|member| {
        let member = member.clone();
        tokio::spawn(async move { text(&member).await })
    });
    let mut texts = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        texts.push(call.await.unwrap());
    }
    texts
}

/// All members have this token.
async fn assert_all(members: &[Refreshing<Token>], expected: &str) {
    for text in texts(members).await {
        assert_eq!(text.as_deref(), Ok(expected));
    }
}

/// N1
#[tokio::test(start_paused = true)]
async fn one_fetch_serves_a_cold_fleet() {
    let mint = Mint::default().taking(50 * MILLI);
    let (members, lines, _) = members::<50>(&mint);
    let began = Instant::now();
    assert_all(&members, "token-1").await;
    assert_eq!(mint.asked(), 1);
    assert!(began.elapsed() < 150 * MILLI, "{:?}", began.elapsed());
    // A claim that loses, and then looks. The watcher reads the news, and the first one begins them.
    let calls = lines.iter().map(Line::calls).max().unwrap();
    assert!(calls <= 10, "{calls} calls");

    let late = member(&join(lines[0].clone()), mint.clone());
    let before = lines[0].calls_but_news();
    assert_eq!(text(&late).await.as_deref(), Ok("token-1"));
    assert_eq!(lines[0].calls_but_news() - before, 1, "a follower's token costs one round trip");
}

/// N1: tokens that expire, for an hour.
#[tokio::test(start_paused = true)]
async fn one_member_refreshes_for_all() {
    let mint = Mint::default().taking(100 * MILLI);
    let (members, _, _) = members::<8>(&mint);
    let mut last = String::new();
    for _ in 0..720 {
        let texts: Vec<_> = texts(&members).await.into_iter().map(Result::unwrap).collect();
        last.clone_from(&texts[0]);
        sleep(5 * SECOND).await;
    }
    // A lifetime is a minute, of which the last tenth is for refreshing.
    assert!((59..=80).contains(&mint.asked()), "{} fetches", mint.asked());
    assert_eq!(last, format!("token-{}", mint.asked()));
}

/// N8: members whose clocks are an hour apart agree on opaque tokens.
#[tokio::test(start_paused = true)]
async fn clocks_may_differ() {
    let mint = Mint::default();
    let store = MemoryStore::default();
    let members: Vec<_> = [0, 3_600, 7_200]
        .map(|offset| {
            let clock = clock();
            clock.jump(Duration::from_secs(offset));
            let policy = RefreshPolicy::new().with_clock(clock);
            Refreshing::with_policy(join(store.clone()).share("selam", mint.clone()), policy)
        })
        .into();
    for _ in 0..60 {
        texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
        sleep(10 * SECOND).await;
    }
    assert!((9..=14).contains(&mint.asked()), "{} fetches", mint.asked());
}

/// N1: a follower knows how old the token is that it adopts.
#[tokio::test(start_paused = true)]
async fn adopted_tokens_have_aged() {
    let mint = Mint::default();
    let ([first, second], _, _) = members(&mint);
    first.token().await.unwrap();
    sleep(40 * SECOND).await;
    let adopted = second.token().await.unwrap();
    assert_eq!(adopted.expose_secret(), "token-1");
    drop(first);
    sleep(17 * SECOND).await;
    assert_eq!(text(&second).await.as_deref(), Ok("token-1"));
    sleep(3 * SECOND).await;
    assert_eq!(text(&second).await.as_deref(), Ok("token-2"), "the first has expired");
}

/// N7: a leader whose caller is dropped gives the lease back at once.
#[tokio::test(start_paused = true)]
async fn a_dropped_leader_is_replaced_at_once() {
    let mint = Mint::default().then(Answer::Hangs);
    let ([first, second], _, _) = members(&mint);
    let began = Instant::now();
    let call = tokio::spawn(async move { text(&first).await });
    sleep(10 * MILLI).await;
    call.abort();
    assert_eq!(text(&second).await.as_deref(), Ok("token-2"));
    assert!(began.elapsed() < SECOND, "{:?}", began.elapsed());
}

/// N7: a leader that is cut off, as if it was killed, is replaced when its lease lapses.
#[tokio::test(start_paused = true)]
async fn a_lost_leader_is_replaced_after_its_lease() {
    let mint = Mint::default().then(Answer::Hangs);
    let ([first, second], [line, _], _) = members(&mint);
    let began = Instant::now();
    let _call = tokio::spawn(async move { text(&first).await });
    sleep(10 * MILLI).await;
    line.set(State::Silent);
    assert_eq!(text(&second).await.as_deref(), Ok("token-2"));
    let waited = began.elapsed();
    assert!((5 * SECOND..6 * SECOND + 300 * MILLI).contains(&waited), "{waited:?}");
}

/// N7: a slow leader keeps its lease.
#[tokio::test(start_paused = true)]
async fn a_slow_leader_is_waited_for() {
    let mint = Mint::default().taking(25 * SECOND);
    let (members, _, _) = members::<3>(&mint);
    assert_all(&members, "token-1").await;
    assert_eq!(mint.asked(), 1);
}

/// N7: a leader that was stopped beyond its lease takes nothing back.
#[tokio::test(start_paused = true)]
async fn a_late_leader_changes_nothing() {
    let mint = Mint::default().taking(20 * SECOND);
    let ([first, second], [line, _], _) = members(&mint);
    let late = tokio::spawn(async move {
        let text = text(&first).await;
        (text, first)
    });
    sleep(10 * MILLI).await;
    line.set(State::Silent);
    sleep(7 * SECOND).await;
    mint.takes(Duration::ZERO);
    assert_eq!(text(&second).await.as_deref(), Ok("token-2"));
    line.set(State::Up);
    let (late, _first) = late.await.unwrap();
    assert_eq!(late.as_deref(), Ok("token-2"));
    let third = member(&join(line), mint.clone());
    assert_all(&[second, third], "token-2").await;
}

/// N5
#[tokio::test(start_paused = true)]
async fn failures_are_shared() {
    let mint = Mint::default().then_always(Answer::Fails(None));
    let (members, _, _) = members::<10>(&mint);
    for _ in 0..100 {
        for text in texts(&members).await {
            assert_eq!(text, Err(AuthErrorKind::RefreshFailed));
        }
        sleep(100 * MILLI).await;
    }
    let pauses = mint.pauses();
    assert!((2..=3).contains(&pauses.len()), "{pauses:?}");
    for (pause, least) in pauses.iter().zip([1, 2, 4]) {
        assert!(*pause >= least * SECOND, "{pauses:?}");
    }
}

/// N5: `Retry-After` holds for all, and a success ends the back-off.
#[tokio::test(start_paused = true)]
async fn retry_after_holds_for_all() {
    let mint = Mint::default().then(Answer::Fails(Some(20 * SECOND)));
    let (members, _, _) = members::<10>(&mint);
    for _ in 0..19 {
        assert!(texts(&members).await.into_iter().all(|text| text.is_err()));
        assert_eq!(mint.asked(), 1);
        sleep(SECOND).await;
    }
    sleep(2 * SECOND).await;
    assert_all(&members, "token-2").await;
}

/// N5: one member's wrong settings do not stop the others for long.
#[tokio::test(start_paused = true)]
async fn a_permanent_failure_is_one_members_own() {
    let mint = Mint::default().then(Answer::Refused);
    let (members, _, _) = members::<3>(&mint);
    let mut kinds: Vec<_> = texts(&members).await.into_iter().map(Result::unwrap_err).collect();
    kinds.sort_by_key(|kind| *kind != AuthErrorKind::RefreshRejected);
    let failed = AuthErrorKind::RefreshFailed;
    assert_eq!(kinds, [AuthErrorKind::RefreshRejected, failed, failed]);
    assert_eq!(mint.asked(), 1);
    sleep(1_100 * MILLI).await;
    let texts = texts(&members).await;
    assert_eq!(texts.iter().filter(|text| text.as_deref() == Ok("token-2")).count(), 2, "{texts:?}");
}

/// N4
#[tokio::test(start_paused = true)]
async fn a_rejected_token_is_withdrawn_everywhere() {
    let mint = Mint::default();
    let (members, lines, _) = members::<10>(&mint);
    assert_all(&members, "token-1").await;
    sleep(5 * SECOND).await;
    let rejected = members[0].token().await.unwrap();
    members[0].rejected(&rejected);
    assert_eq!(text(&members[0]).await.as_deref(), Ok("token-2"));
    sleep(1_100 * MILLI).await;
    assert_all(&members, "token-2").await;
    assert_eq!(mint.asked(), 2);

    // Late news of the first one.
    members[5].rejected(&rejected);
    sleep(SECOND).await;
    assert_all(&members, "token-2").await;
    assert_eq!(mint.asked(), 2);

    let calls = lines.iter().map(Line::calls).collect::<Vec<_>>();
    sleep(10 * SECOND).await;
    for (line, before) in lines.iter().zip(calls) {
        let calls = line.calls() - before;
        assert!((9..=14).contains(&calls), "{calls} calls in ten seconds");
    }
}

/// N4: members that learn of a rejection by their own 401s share one fetch.
#[tokio::test(start_paused = true)]
async fn rejections_at_once_are_one_fetch() {
    let mint = Mint::default().taking(50 * MILLI);
    let (members, _, _) = members::<10>(&mint);
    assert_all(&members, "token-1").await;
    let rejected = members[0].token().await.unwrap();
    members.iter().for_each(|member| member.rejected(&rejected));
    assert_all(&members, "token-2").await;
    assert_eq!(mint.asked(), 2);
}

/// N4: one replica whose requests are always rejected does not cost a fetch each time.
#[tokio::test(start_paused = true)]
async fn a_member_that_is_always_rejected_is_spaced() {
    let mint = Mint::default();
    let (members, _, _) = members::<3>(&mint);
    for _ in 0..600 {
        for member in &members[..2] {
            let token = member.token().await.unwrap();
            member.rejected(&token);
        }
        members[2].token().await.unwrap();
        sleep(100 * MILLI).await;
    }
    // 1, 2, 4, 8, 16 and 32 seconds after each other, and the refreshes that are due.
    assert!(mint.asked() <= 10, "{} fetches in a minute", mint.asked());
}

/// N6
#[tokio::test(start_paused = true)]
async fn without_the_store_each_member_goes_on_alone() {
    let mint = Mint::default();
    let (members, lines, _) = members::<4>(&mint);
    assert_all(&members, "token-1").await;
    for state in [State::Down, State::Silent] {
        lines.iter().for_each(|line| line.set(state));
        for _ in 0..90 {
            let began = Instant::now();
            texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
            // The store's timeout, once with a claim. Then its calls stop.
            assert!(began.elapsed() <= 500 * MILLI, "{:?}", began.elapsed());
            sleep(2 * SECOND).await;
        }
        lines.iter().for_each(|line| line.set(State::Up));
        sleep(2 * MINUTE).await;
        let texts = texts(&members).await;
        assert!(texts.iter().all(|text| text == &texts[0]), "{texts:?}");
        let asked = mint.asked();
        sleep(30 * SECOND).await;
        assert_eq!(mint.asked(), asked);
    }
}

/// N6: a store that fails costs a new member one timeout, and then nothing.
#[tokio::test(start_paused = true)]
async fn a_silent_store_at_the_start_delays_once() {
    let mint = Mint::default();
    let line = Line::new(&MemoryStore::default());
    line.set(State::Silent);
    let fleet = join(line.clone());
    let users = PerSubject::new(move |user: &Subject| fleet.share(user.as_str(), mint.clone()));
    let mut waits = Vec::new();
    for number in 0..10 {
        let began = Instant::now();
        users.of_subject(&Subject::new(format!("user-{number}"))).token().await.unwrap();
        waits.push(began.elapsed());
    }
    assert!(waits.iter().all(|wait| *wait <= 500 * MILLI), "{waits:?}");
    assert!(waits[4..].iter().all(Duration::is_zero), "{waits:?}");
}

/// N6: what a member fetched without the store is there for all when the store is back, though nobody asks.
#[tokio::test(start_paused = true)]
async fn what_was_fetched_alone_is_shared_later() {
    let mint = Mint::default().then_always(Answer::Lives(60 * MINUTE));
    let ([alone, late], [line, _], _) = members(&mint);
    line.set(State::Down);
    assert_eq!(text(&alone).await.as_deref(), Ok("token-1"));
    line.set(State::Up);
    sleep(2 * SECOND).await;
    assert_eq!(text(&late).await.as_deref(), Ok("token-1"));
}

/// N4, N6: so are rejections.
#[tokio::test(start_paused = true)]
async fn what_was_rejected_without_the_store_is_withdrawn_later() {
    let mint = Mint::default().then_always(Answer::Lives(60 * MINUTE));
    let (members, lines, _) = members::<3>(&mint);
    assert_all(&members, "token-1").await;
    lines[0].set(State::Down);
    members[0].rejected(&members[0].token().await.unwrap());
    assert_eq!(text(&members[0]).await.as_deref(), Ok("token-2"));
    assert_all(&members[1..], "token-1").await;
    lines[0].set(State::Up);
    sleep(4 * SECOND).await;
    assert_all(&members, "token-2").await;
}

/// N6: what the store loses, members put back, before any of them has to fetch.
#[tokio::test(start_paused = true)]
async fn a_store_that_lost_everything_is_mended() {
    let mint = Mint::default().then_always(Answer::Lives(60 * MINUTE));
    let (members, lines, store) = members::<3>(&mint);
    assert_all(&members, "token-1").await;
    sleep(5 * SECOND).await;
    store.clear();
    sleep(1_200 * MILLI).await;
    let late = member(&join(lines[0].clone()), mint.clone());
    assert_eq!(text(&late).await.as_deref(), Ok("token-1"));
    assert_eq!(mint.asked(), 1);
}

/// N6: replies that are lost, and writes that arrive late.
#[tokio::test(start_paused = true)]
async fn lost_replies_lose_nothing() {
    for state in [State::DropsReplies, State::Slow] {
        let mint = Mint::default();
        let (members, lines, _) = members::<3>(&mint);
        lines[0].set(state);
        for _ in 0..30 {
            texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
            sleep(5 * SECOND).await;
        }
        assert!(mint.asked() <= 8, "{state:?}: {} fetches", mint.asked());
        // Nor is a rejection kept from the others.
        let rejected = members[0].token().await.unwrap();
        members[0].rejected(&rejected);
        members[0].token().await.unwrap();
        sleep(4 * SECOND).await;
        for text in texts(&members).await {
            assert_ne!(text.as_deref(), Ok(rejected.expose_secret()), "{state:?}");
        }
    }
}

/// N4, N6: an ended credential is withdrawn, and does not come back from a member's memory.
#[tokio::test(start_paused = true)]
async fn a_forgotten_token_does_not_come_back() {
    let mint = Mint::default().then_always(Answer::Lives(60 * MINUTE));
    let (members, lines, store) = members::<3>(&mint);
    assert_all(&members, "token-1").await;
    let admin = join(lines[0].clone());
    admin.forget("selam").await.unwrap();
    sleep(1_200 * MILLI).await;
    assert_all(&members, "token-2").await;
    let status = admin.status("selam").await.unwrap().unwrap();
    assert_eq!(status.token, Some(members[0].token().await.unwrap().id()));
    store.clear();
    sleep(1_200 * MILLI).await;
    assert_all(&members, "token-2").await;
    assert_eq!(mint.asked(), 2);
}

/// N3: a member with another key neither reads nor replaces a record. With the former key it does both.
#[tokio::test(start_paused = true)]
async fn keys_are_rotated_one_member_at_a_time() {
    let mint = Mint::default().then_always(Answer::Lives(60 * MINUTE));
    let store = MemoryStore::default();
    let old = member(&join(store.clone()), mint.clone());
    assert_eq!(text(&old).await.as_deref(), Ok("token-1"));

    let wrong = Fleet::new("billing", store.clone(), key(2)).unwrap();
    assert_eq!(text(&member(&wrong, mint.clone())).await.as_deref(), Ok("token-2"));
    assert!(wrong.status("selam").await.unwrap_err().to_string().contains("sealed with a key"));

    let both = Fleet::builder("billing", store.clone(), key(2)).with_former_key(key(1)).build().unwrap();
    let new = member(&both, mint.clone());
    assert_eq!(text(&new).await.as_deref(), Ok("token-1"));
    new.rejected(&new.token().await.unwrap());
    assert_eq!(text(&new).await.as_deref(), Ok("token-3"), "sealed with the new key");
    assert!(join(store.clone()).status("selam").await.is_err());
    assert_eq!(text(&member(&wrong, mint.clone())).await.as_deref(), Ok("token-3"));

    // Nor does a member with another key touch the news.
    let odd = member(&Fleet::new("billing", store.clone(), key(3)).unwrap(), mint.clone());
    odd.token().await.unwrap();
    odd.rejected(&odd.token().await.unwrap());
    odd.token().await.unwrap();
    sleep(2 * SECOND).await;
    let holder = member(&wrong, mint.clone());
    assert_eq!(text(&holder).await.as_deref(), Ok("token-3"));
    new.rejected(&new.token().await.unwrap());
    new.token().await.unwrap();
    sleep(1_100 * MILLI).await;
    assert_eq!(text(&new).await.as_deref(), Ok("token-6"));
    assert_eq!(text(&holder).await.as_deref(), Ok("token-6"), "it has heard of the rejection");
}

/// N3: a changed record is replaced where nothing is lost by that. A login needs a new one.
#[tokio::test(start_paused = true)]
async fn changed_records_are_not_used() {
    let mint = Mint::default();
    let ([first, second], [_, line], _) = members(&mint);
    first.token().await.unwrap();
    line.set(State::Corrupts);
    assert_eq!(text(&second).await.as_deref(), Ok("token-2"));

    let simulator = Simulator::new();
    let store = MemoryStore::default();
    let first = simulator.issue_refresh_token();
    login(&join(store.clone()), &simulator, Some(&first)).token().await.unwrap();
    let line = Line::new(&store);
    line.set(State::Corrupts);
    let fleet = join(line.clone());
    let member = login(&fleet, &simulator, Some(&first));
    let error = member.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshRejected);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("log in again"), "{cause}");
    assert_eq!(simulator.token_requests(), 1);
    fleet.log_in("login", &RefreshToken::new(simulator.issue_refresh_token()).unwrap()).await.unwrap();
    line.set(State::Up);
    sleep(2 * SECOND).await;
    member.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
}

/// N3: other fleets, other names, other scopes.
#[tokio::test(start_paused = true)]
async fn tokens_do_not_mix() {
    struct Scoped(Mint, &'static str);

    impl Source<Token> for Scoped {
        async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
            self.0.fetch(reason).await
        }

        fn identity(&self) -> Option<String> {
            Some(self.1.to_owned())
        }
    }

    let mint = Mint::default();
    let store = MemoryStore::default();
    let [billing, payroll] =
        ["billing", "payroll"].map(|name| Fleet::new(name, store.clone(), key(1)).unwrap());
    let mut seen = Vec::new();
    for (fleet, name, scope) in [
        (&billing, "a", "read"),
        (&billing, "b", "read"),
        (&payroll, "a", "read"),
        (&payroll, "a", "write"),
        (&payroll, "a", "write"),
    ] {
        seen.push(
            Refreshing::new(fleet.share(name, Scoped(mint.clone(), scope))).token().await.unwrap().id(),
        );
    }
    assert_eq!(seen[3], seen[4]);
    seen.dedup();
    assert_eq!((seen.len(), mint.asked()), (4, 4));
    for name in ["", "a b", "ä", "a:b", "*", &"a".repeat(65)] {
        assert!(Fleet::new(name, store.clone(), key(1)).is_err(), "{name}");
    }
}

/// N1: each user's token is fetched once for the fleet.
#[tokio::test(start_paused = true)]
async fn users_are_shared() {
    let mint = Mint::default();
    let store = MemoryStore::default();
    let replicas = [(); 4].map(|()| {
        let (fleet, mint) = (join(store.clone()), mint.clone());
        PerSubject::new(move |user: &Subject| fleet.share(user.as_str(), mint.clone()))
    });
    for round in 0..3 {
        for user in 0..100 {
            let user = Subject::new(format!("user-{user}"));
            let replica = &replicas[(round + fastrand::usize(..)) % 4];
            replica.of_subject(&user).token().await.unwrap();
        }
    }
    assert_eq!(mint.asked(), 100);
}

fn endpoint(simulator: &Simulator) -> TokenEndpoint {
    let endpoint = TokenEndpoint::new::<_, Body, _>(URL, simulator.clone()).unwrap();
    endpoint.with_client_auth(ClientAuth::public("app").unwrap())
}

fn login(fleet: &Fleet, simulator: &Simulator, initial: Option<&str>) -> Refreshing<Token> {
    let initial = initial.map(|token| RefreshToken::new(token).unwrap());
    let endpoint = endpoint(simulator);
    Refreshing::new(fleet.share_login("login", |login| {
        let login = match initial {
            Some(token) => login.with_initial(token),
            None => login,
        };
        OAuthSource::refresh_token(endpoint, login)
    }))
}

/// Logs in, as another program does.
async fn log_in(store: &MemoryStore, simulator: &Simulator) {
    let token = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
    join(store.clone()).log_in("login", &token).await.unwrap();
}

/// N2: strict rotation, with reuse detection.
#[tokio::test(start_paused = true)]
async fn a_rotating_login_survives_its_fleet() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(10 * SECOND);
    let first = simulator.issue_refresh_token();
    let store = MemoryStore::default();
    let members: Vec<_> = (0..8).map(|_| login(&join(store.clone()), &simulator, Some(&first))).collect();
    for step in 0..150 {
        if step % 7 == 0 {
            simulator.inject_token_fault(TokenFault::Slow(3 * SECOND));
        }
        texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
        sleep(SECOND).await;
    }
    assert_eq!(simulator.reused_refresh_tokens(), 0);
    let exchanges = simulator.token_requests();
    assert!((12..=35).contains(&exchanges), "{exchanges} exchanges");
}

/// N2: no refresh token is spent while the store fails, and the login continues when it is back.
#[tokio::test(start_paused = true)]
async fn without_the_store_no_login_is_spent() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let first = simulator.issue_refresh_token();
    let line = Line::new(&MemoryStore::default());
    let member = login(&join(line.clone()), &simulator, Some(&first));
    member.token().await.unwrap();
    line.set(State::Down);
    sleep(55 * SECOND).await;
    member.token().await.unwrap();
    sleep(10 * SECOND).await;
    let error = member.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("store"), "{cause}");
    assert_eq!(simulator.token_requests(), 1);
    line.set(State::Up);
    sleep(MINUTE).await;
    member.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0));
}

/// N2: the store fails while the refresh token is being spent. The new one is stored as soon as it is back.
#[tokio::test(start_paused = true)]
async fn a_refresh_token_that_is_not_stored_is_stored_later() {
    let simulator = Simulator::new();
    let store = MemoryStore::default();
    log_in(&store, &simulator).await;
    let line = Line::new(&store);
    let member = login(&join(line.clone()), &simulator, None);
    simulator.inject_token_fault(TokenFault::Slow(SECOND));
    let call = tokio::spawn(async move { (text(&member).await, member) });
    sleep(500 * MILLI).await;
    line.set(State::Silent);
    let (token, _member) = call.await.unwrap();
    token.unwrap();
    line.set(State::Up);
    sleep(20 * SECOND).await;
    let status = join(store.clone()).status("login").await.unwrap().unwrap();
    assert!(!status.is_maybe_spent && status.token.is_some(), "{status}");
    let other = login(&join(store), &simulator, None);
    other.token().await.unwrap();
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (1, 0));
}

/// N2, N7: a refresh token that arrives after its leader has lost the lease is stored, and its successor finds it.
#[tokio::test(start_paused = true)]
async fn a_late_refresh_token_is_found() {
    let sent = Arc::new(std::sync::Mutex::new(Vec::new()));
    let answers = Arc::clone(&sent);
    let client = tower::service_fn(move |request: http::Request<Body>| {
        let answers = Arc::clone(&answers);
        async move {
            let body = http_body_util::BodyExt::collect(request.into_body()).await?.to_bytes();
            let form =
                form_urlencoded::parse(&body).into_owned().collect::<std::collections::HashMap<_, _>>();
            let number = {
                let mut sent = answers.lock().unwrap();
                sent.push(form["refresh_token"].clone());
                sent.len()
            };
            let next = match number {
                1 => {
                    sleep(33 * SECOND).await;
                    2
                }
                // The first token is spent. This endpoint does not revoke the second for that.
                2 => {
                    let refused = http::Response::builder().status(400);
                    return Ok::<_, BoxError>(refused.body(Body::from(r#"{"error":"invalid_grant"}"#))?);
                }
                number => number,
            };
            let answer = format!(
                r#"{{"access_token":"access-{next}","token_type":"Bearer","refresh_token":"refresh-{next}"}}"#
            );
            Ok(http::Response::new(Body::from(answer)))
        }
    });
    let endpoint = TokenEndpoint::new(URL, client).unwrap();
    let store = MemoryStore::default();
    join(store.clone()).log_in("login", &RefreshToken::new("refresh-1").unwrap()).await.unwrap();
    let lines = [(); 2].map(|()| Line::new(&store));
    let [late, successor] = [&lines[0], &lines[1]].map(|line| {
        let source = |login: FleetLogin| OAuthSource::refresh_token(endpoint.clone(), login);
        Refreshing::new(join(line.clone()).share_login("login", source))
    });
    let late = tokio::spawn(async move { (text(&late).await, late) });
    sleep(SECOND).await;
    lines[0].set(State::Silent);
    let successor = tokio::spawn(async move {
        sleep(10 * SECOND).await;
        text(&successor).await
    });
    sleep(31 * SECOND + 900 * MILLI).await;
    lines[0].set(State::Up);
    assert_eq!(successor.await.unwrap().as_deref(), Ok("access-3"));
    assert_eq!(*sent.lock().unwrap(), ["refresh-1", "refresh-1", "refresh-2"]);
    drop(late.await);
}

/// N2: an unanswered exchange is repeated only when no token is left.
#[tokio::test(start_paused = true)]
async fn a_maybe_spent_refresh_token_is_spared() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let first = simulator.issue_refresh_token();
    let store = MemoryStore::default();
    let members = [(); 3].map(|()| login(&join(store.clone()), &simulator, Some(&first)));
    texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
    simulator.inject_token_fault(TokenFault::CutOff);
    sleep(55 * SECOND).await;
    for _ in 0..4 {
        texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
        sleep(SECOND).await;
    }
    assert_eq!(simulator.token_requests(), 2, "it is not sent again while a token is valid");
    let status = join(store.clone()).status("login").await.unwrap().unwrap();
    assert!(status.is_maybe_spent && status.to_string().contains("(maybe spent)"), "{status}");
    sleep(2 * SECOND).await;
    let _ = texts(&members).await;
    sleep(10 * SECOND).await;
    let _ = texts(&members).await;
    assert!(simulator.token_requests() <= 4, "{} requests", simulator.token_requests());
}

/// N2, N4: a login that begins, is replaced and ends, from another program.
#[tokio::test(start_paused = true)]
async fn logins_are_replaced_for_all_members() {
    let simulator = Simulator::new();
    let store = MemoryStore::default();
    let members = [(); 3].map(|()| login(&join(store.clone()), &simulator, None));
    for text in texts(&members).await {
        assert_eq!(text, Err(AuthErrorKind::RefreshRejected));
    }
    let admin = join(store.clone());
    let log_in = async || {
        let token = RefreshToken::new(simulator.issue_refresh_token()).unwrap();
        admin.log_in("login", &token).await.unwrap();
        sleep(2_200 * MILLI).await;
    };
    log_in().await;
    let first = texts(&members).await;
    assert!(first.iter().all(|text| text.is_ok() && text == &first[0]), "{first:?}");
    log_in().await;
    let second = texts(&members).await;
    assert!(second.iter().all(|text| text.is_ok() && text == &second[0] && text != &first[0]), "{second:?}");
    admin.forget("login").await.unwrap();
    sleep(1_200 * MILLI).await;
    for text in texts(&members).await {
        assert_eq!(text, Err(AuthErrorKind::RefreshRejected));
    }
    // Nor does it come back from a member's memory.
    store.clear();
    sleep(2 * SECOND).await;
    assert!(admin.status("login").await.unwrap().is_none_or(|status| status.refresh_token.is_none()));
    assert_eq!(simulator.token_requests(), 2);
}

/// N2, N4: a login that is replaced while its token is being fetched. The new one is spent once, and the old one's token not used.
#[tokio::test(start_paused = true)]
async fn a_login_is_replaced_during_an_exchange() {
    for after in [100, 500, 900, 1_100, 1_900] {
        let simulator = Simulator::new();
        let store = MemoryStore::default();
        log_in(&store, &simulator).await;
        let members = [(); 3].map(|()| login(&join(store.clone()), &simulator, None));
        simulator.inject_token_fault(TokenFault::Slow(SECOND));
        let calls = members.iter().map(|member| {
            let member = member.clone();
            tokio::spawn(async move { text(&member).await })
        });
        let calls: Vec<_> = calls.collect();
        sleep(after * MILLI).await;
        log_in(&store, &simulator).await;
        sleep(4 * SECOND).await;
        for call in calls {
            call.await.unwrap().unwrap();
        }
        let texts = texts(&members).await;
        assert!(texts.iter().all(|text| text.is_ok() && text == &texts[0]), "{after}: {texts:?}");
        let status = join(store).status("login").await.unwrap().unwrap();
        assert_eq!(status.token, Some(members[0].token().await.unwrap().id()), "{after}");
        assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (2, 0), "{after}");
    }
}

/// N4: a token that is being fetched when its credential ends is not used.
#[tokio::test(start_paused = true)]
async fn a_token_that_ends_while_it_is_fetched_is_not_used() {
    let mint = Mint::default().taking(SECOND);
    let ([first, second], [line, _], _) = members(&mint);
    let call = tokio::spawn(async move { (text(&first).await, first) });
    sleep(500 * MILLI).await;
    join(line.clone()).forget("selam").await.unwrap();
    let (text, first) = call.await.unwrap();
    assert_eq!(text.as_deref(), Ok("token-2"));
    assert_all(&[first, second], "token-2").await;
}

/// N3: a record that was unreadable for a while is used again.
#[tokio::test(start_paused = true)]
async fn an_unreadable_record_is_read_again() {
    let mint = Mint::default();
    let store = MemoryStore::default();
    let odd = Fleet::new("billing", store.clone(), key(2)).unwrap();
    odd.forget("selam").await.unwrap();
    let members: Vec<_> = (0..3).map(|_| member(&join(store.clone()), mint.clone())).collect();
    texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
    assert_eq!(mint.asked(), 3, "each is alone");
    store.clear();
    for _ in 0..30 {
        sleep(5 * SECOND).await;
        texts(&members).await.into_iter().for_each(|text| drop(text.unwrap()));
    }
    assert!(mint.asked() <= 8, "{} fetches", mint.asked());
}

/// N2, N6: a member that starts with the token of long ago, just after the store has lost everything, spends nothing.
#[tokio::test(start_paused = true)]
async fn a_spent_initial_token_is_not_spent_on_an_empty_store() {
    let simulator = Simulator::new();
    let store = MemoryStore::default();
    let first = simulator.issue_refresh_token();
    let member = login(&join(store.clone()), &simulator, Some(&first));
    let token = member.token().await.unwrap();
    store.clear();
    let late = login(&join(store), &simulator, Some(&first));
    assert_eq!(late.token().await.unwrap().id(), token.id());
    assert_eq!((simulator.token_requests(), simulator.reused_refresh_tokens()), (1, 0));
}

/// N4, N6: a logout is put back, too.
#[tokio::test(start_paused = true)]
async fn a_logout_outlives_the_loss_of_its_store() {
    let simulator = Simulator::new();
    let store = MemoryStore::default();
    let first = simulator.issue_refresh_token();
    let member = login(&join(store.clone()), &simulator, Some(&first));
    member.token().await.unwrap();
    join(store.clone()).forget("login").await.unwrap();
    sleep(2 * SECOND).await;
    assert_eq!(text(&member).await, Err(AuthErrorKind::RefreshRejected));
    store.clear();
    sleep(3 * SECOND).await;
    let late = login(&join(store), &simulator, Some(&first));
    assert_eq!(text(&late).await, Err(AuthErrorKind::RefreshRejected));
    assert_eq!(simulator.token_requests(), 1);
}

/// N3, N4: the news are sealed with the new key before the old one is dropped.
#[tokio::test(start_paused = true)]
async fn news_reach_members_with_the_new_key_alone() {
    let mint = Mint::default().then_always(Answer::Lives(60 * MINUTE));
    let store = MemoryStore::default();
    let old = member(&join(store.clone()), mint.clone());
    old.token().await.unwrap();
    sleep(2 * SECOND).await;
    drop(old);
    let both = Fleet::builder("billing", store.clone(), key(2)).with_former_key(key(1)).build().unwrap();
    let both = member(&both, mint.clone());
    both.token().await.unwrap();
    sleep(2 * SECOND).await;
    drop(both);

    let new = || Fleet::new("billing", store.clone(), key(2)).unwrap();
    let members = [(); 2].map(|()| Refreshing::new(new().share("other", mint.clone())));
    assert_all(&members, "token-2").await;
    members[0].rejected(&members[0].token().await.unwrap());
    assert_eq!(text(&members[0]).await.as_deref(), Ok("token-3"));
    sleep(1_100 * MILLI).await;
    assert_all(&members, "token-3").await;
}

/// N6: a login lives as long as a member does.
#[tokio::test(start_paused = true)]
async fn a_login_outlives_the_loss_of_its_store() {
    let simulator = Simulator::new();
    simulator.set_token_lifetime(MINUTE);
    let first = simulator.issue_refresh_token();
    let store = MemoryStore::default();
    let member = login(&join(store.clone()), &simulator, Some(&first));
    let other = login(&join(store.clone()), &simulator, Some(&first));
    for _ in 0..5 {
        member.token().await.unwrap();
        sleep(2 * SECOND).await;
        store.clear();
        sleep(2 * SECOND).await;
        other.token().await.unwrap();
        sleep(2 * MINUTE).await;
    }
    assert_eq!(simulator.reused_refresh_tokens(), 0);
}

/// N6: a member that starts while the store is empty, with the token of long ago, takes nothing from the others.
#[tokio::test(start_paused = true)]
async fn an_initial_token_does_not_replace_a_login() {
    let simulator = Simulator::new();
    let store = MemoryStore::default();
    let line = Line::new(&store);
    let long_ago = simulator.issue_refresh_token();
    let member = login(&join(line.clone()), &simulator, Some(&simulator.issue_refresh_token()));
    member.token().await.unwrap();
    member.rejected(&member.token().await.unwrap());
    let token = member.token().await.unwrap();
    line.set(State::Down);
    store.clear();
    login(&join(store.clone()), &simulator, Some(&long_ago)).token().await.unwrap();
    join(store.clone()).status("login").await.unwrap().unwrap();
    line.set(State::Up);
    sleep(MINUTE).await;
    let status = join(store).status("login").await.unwrap().unwrap();
    assert_eq!((status.token, status.generation), (Some(token.id()), 5));
}

/// N7
#[tokio::test(start_paused = true)]
async fn members_leave_without_a_trace() {
    let simulator = Simulator::new();
    let store = MemoryStore::default();
    log_in(&store, &simulator).await;
    let fleet = join(store.clone());
    let member = login(&fleet, &simulator, None);
    let mint = Mint::default().then(Answer::Hangs);
    let hanging = Refreshing::new(fleet.share("selam", mint.clone()));
    simulator.inject_token_fault(TokenFault::Slow(3 * SECOND));
    let spending = tokio::spawn(async move { (text(&member).await, member) });
    let hangs = tokio::spawn(async move { text(&hanging).await });
    sleep(10 * MILLI).await;

    let began = Instant::now();
    fleet.leave().await;
    assert!((2 * SECOND..4 * SECOND).contains(&began.elapsed()), "{:?}", began.elapsed());
    let (token, member) = spending.await.unwrap();
    token.unwrap();
    let admin = join(store.clone());
    for name in ["login", "selam"] {
        assert!(!admin.status(name).await.unwrap().unwrap().is_refreshing, "{name}");
    }
    assert_eq!(text(&super::fleet::member(&admin, mint.clone())).await.as_deref(), Ok("token-2"));

    // It serves on, and spends nothing.
    member.rejected(&member.token().await.unwrap());
    member.token().await.unwrap();
    assert_eq!(simulator.token_requests(), 1);
    hangs.abort();
}

/// N6, F6: the task that watches the store ends with the last engine.
#[tokio::test(start_paused = true)]
async fn nothing_is_left_running() {
    let (members, lines, store) = members::<2>(&Mint::default());
    assert_all(&members, "token-1").await;
    drop(members);
    sleep(2 * SECOND).await;
    let calls: Vec<_> = lines.iter().map(Line::calls).collect();
    sleep(MINUTE).await;
    assert_eq!(lines.iter().map(Line::calls).collect::<Vec<_>>(), calls);
    let weak = Arc::downgrade(&lines[0].shared);
    let metrics = tokio::runtime::Handle::current().metrics();
    drop((lines, store));
    assert!(weak.upgrade().is_none());
    assert_eq!(metrics.num_alive_tasks(), 0);
}

/// N4: a source withdraws what it knows to have ended.
#[tokio::test(start_paused = true)]
async fn any_source_can_withdraw_a_credential() {
    use std::sync::OnceLock;
    use tower_selam::source::EngineHandle;

    #[derive(Clone, Default)]
    struct Revocable(Mint, Arc<OnceLock<EngineHandle<Token>>>);

    impl Source<Token> for Revocable {
        async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
            self.0.fetch(reason).await
        }

        fn attach(&self, engine: EngineHandle<Token>) {
            self.1.set(engine).unwrap();
        }
    }

    let source = Revocable::default();
    let jwts = Refreshing::new(source.clone());
    let engine = source.1.get().unwrap();
    let first = jwts.token().await.unwrap();
    engine.withdraw(&Token::new("another").unwrap());
    assert_eq!(text(&jwts).await.as_deref(), Ok("token-1"));
    engine.withdraw(&first);
    assert!(jwts.current().is_none());
    assert_eq!(text(&jwts).await.as_deref(), Ok("token-2"));
    assert_eq!(source.0.reasons(), ["first", "first"]);
    engine.withdraw(&first);
    assert_eq!(text(&jwts).await.as_deref(), Ok("token-2"));
    drop(jwts);
    assert_eq!(format!("{engine:?}"), "EngineHandle { is_alive: false }");
    engine.withdraw(&first);
}

/// S2: nothing that is printed or stored holds a secret or a name.
#[tokio::test(start_paused = true)]
async fn nothing_stored_or_printed_tells_a_secret() {
    let simulator = Simulator::new();
    let first = simulator.issue_refresh_token();
    let line = Line::new(&MemoryStore::default());
    let fleet = join(line.clone());
    let source = fleet.share_login("ada@example.com", |login| {
        let login = login.with_initial(RefreshToken::new(first.clone()).unwrap());
        assert!(!format!("{login:?}").contains(&first));
        OAuthSource::refresh_token(endpoint(&simulator), login)
    });
    let mut printed =
        format!("{fleet:?} {source:?} {:?} {:?}", key(1), Fleet::builder("x", line.clone(), key(1)));
    let member = Refreshing::new(source);
    let token = member.token().await.unwrap();
    let status = fleet.status("ada@example.com").await.unwrap().unwrap();
    printed += &format!("{status} {status:?}");
    line.set(State::Down);
    printed +=
        &format!("{:?}", fleet.log_in("ada@example.com", &RefreshToken::new("a-secret").unwrap()).await);
    let stored = line.written();
    assert!(stored.len() > 3);
    let everything = [printed.as_bytes().to_vec(), stored.concat()].concat();
    for secret in [token.expose_secret(), &first, "a-secret", "ada@example.com", "refresh_token"] {
        let found = everything.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found || secret == "refresh_token", "{secret} is stored or printed");
    }
    let _ = timeout(SECOND, fleet.leave()).await;
    assert_eq!(status.refresh_token.map(|id| id.to_string().len()), Some(6));
    let _: BoxError = "used".into();
}
