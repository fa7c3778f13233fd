//! Tests of single flight: one refresh for all waiters, whichever leave and however long it takes.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::Barrier,
    time::{Instant, sleep},
};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Layer, ServiceExt};
use tower_selam::{
    ApiKeyLayer, AuthErrorKind, BoxError, JwtLayer, RefreshPolicy, Refreshing, Token,
    source::{Fetched, Reason, source_fn},
};

use crate::{
    api::{Api, request},
    mint::{Answer, MINUTE, Mint, SECOND, clock, engine, settle, spawn_callers, text},
    support::key,
};

/// F1, F2: ten thousand waiters share one refresh, or its one error.
#[tokio::test(start_paused = true)]
async fn ten_thousand_callers_share_one_refresh() {
    for answer in [Answer::Lives(MINUTE), Answer::Fails(None)] {
        let mint = Mint::default().taking(Duration::from_millis(50)).then(answer.clone());
        let (jwts, _) = engine(&mint);
        let callers: Vec<_> = (0..10_000)
            .map(|_| {
                let jwts = jwts.clone();
                tokio::spawn(async move { jwts.token().await })
            })
            .collect();
        let mut causes = HashSet::new();
        for caller in callers {
            match caller.await.unwrap() {
                Ok(token) => assert_eq!(token.expose_secret(), "token-1"),
                Err(error) => {
                    let cause = std::error::Error::source(&error).expect("a cause");
                    causes.insert(std::ptr::from_ref(cause).cast::<()>().addr());
                }
            }
        }
        assert_eq!(mint.asked(), 1);
        assert_eq!(causes.len(), usize::from(matches!(answer, Answer::Fails(_))), "one shared error");
    }
}

/// F3: the refresh completes after all its callers were dropped.
#[tokio::test(start_paused = true)]
async fn refresh_completes_without_its_callers() {
    let mint = Mint::default().taking(SECOND);
    let (jwts, _) = engine(&mint);
    for _ in 0..3 {
        let waited = tokio::time::timeout(Duration::from_millis(100), jwts.token()).await;
        assert!(waited.is_err(), "the caller must be dropped while it waits");
    }
    sleep(SECOND).await;
    assert_eq!(jwts.current().unwrap().expose_secret(), "token-1");
    assert_eq!(mint.asked(), 1);
}

/// F4: a refresh that hangs ends at its timeout, and the next call tries again.
#[tokio::test(start_paused = true)]
async fn hanging_refresh_ends_at_its_timeout() {
    let mint = Mint::default().then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let began = Instant::now();
    let error = jwts.token().await.unwrap_err();
    assert_eq!(began.elapsed(), Duration::from_secs(30));
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
}

/// F2: without a back-off, waiters still get the error of the refresh that they waited for.
#[tokio::test(start_paused = true)]
async fn waiters_get_the_error_without_backoff() {
    let mint = Mint::default().taking(SECOND).then_always(Answer::Fails(None));
    let policy = RefreshPolicy::new().with_backoff(Duration::ZERO, Duration::ZERO);
    let jwts = Refreshing::with_policy(mint.clone(), policy);
    let callers = spawn_callers(&jwts, 100);
    for caller in callers {
        assert_eq!(caller.await.unwrap(), Err(AuthErrorKind::RefreshFailed));
    }
    assert_eq!(mint.asked(), 1);
}

/// F1: callers on many threads share one refresh.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn callers_on_many_threads_share_one_refresh() {
    for _ in 0..50 {
        let mint = Mint::default();
        let jwts = Refreshing::new(mint.clone());
        let start = Arc::new(Barrier::new(64));
        let callers: Vec<_> = (0..64)
            .map(|_| {
                let (jwts, start) = (jwts.clone(), Arc::clone(&start));
                tokio::spawn(async move {
                    start.wait().await;
                    text(&jwts).await
                })
            })
            .collect();
        for caller in callers {
            assert_eq!(caller.await.unwrap().unwrap(), "token-1");
        }
        assert_eq!(mint.asked(), 1);
    }
}

/// F1: ten thousand requests through a layer share one refresh, and each is sent once.
#[tokio::test(start_paused = true)]
async fn ten_thousand_requests_share_one_refresh() {
    let mint = Mint::default().taking(SECOND);
    let (jwts, _) = engine(&mint);
    let api = Api::accepting_all();
    let service = (JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service());
    let calls: Vec<_> = (0..10_000).map(|_| tokio::spawn(service.clone().oneshot(request()))).collect();
    settle().await;
    assert!(api.bearers().is_empty(), "nothing may be sent without a token");
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let sent = api.bearers();
    assert_eq!((sent.len(), sent.iter().all(|bearer| bearer == "token-1"), mint.asked()), (10_000, true, 1));
}

/// F3: whichever waiters are dropped, the leading caller included, the others get the token.
#[tokio::test(start_paused = true)]
async fn remaining_waiters_get_the_token() {
    // The first of three waiters starts the refresh. One waiter is dropped, or two, or all.
    for leave in [[true, false, false], [false, true, false], [true, true, false], [true, true, true]] {
        let mint = Mint::default().taking(SECOND);
        let (jwts, _) = engine(&mint);
        let mut callers: Vec<_> = leave.iter().map(|_| task::spawn(jwts.token())).collect();
        for caller in &mut callers {
            assert_pending!(caller.poll());
        }
        sleep(SECOND / 2).await;
        let mut leave = leave.iter();
        callers.retain(|_| !leave.next().unwrap());
        sleep(SECOND / 2).await;
        settle().await;
        for caller in &mut callers {
            assert!(caller.is_woken());
            assert_eq!(assert_ready_ok!(caller.poll()).expose_secret(), "token-1");
        }
        assert_eq!((jwts.current().unwrap().expose_secret(), mint.asked()), ("token-1", 1));
    }
}

/// F3: a rotated refresh token is kept although all callers were dropped.
#[tokio::test(start_paused = true)]
async fn rotated_refresh_token_survives_its_callers() {
    // Each refresh token is valid once; the response brings the next one.
    let (next, spent) = (Arc::new(Mutex::new(1)), Arc::new(Mutex::new(Vec::new())));
    let (held, server) = (Arc::clone(&next), Arc::clone(&spent));
    let source = source_fn(move |_: Reason<Token>| {
        let (held, server) = (Arc::clone(&held), Arc::clone(&server));
        async move {
            let refresh = *held.lock().unwrap();
            server.lock().unwrap().push(refresh);
            sleep(SECOND).await;
            *held.lock().unwrap() = refresh + 1;
            let token = Token::new(format!("of-refresh-token-{refresh}"))?;
            Ok::<_, BoxError>(Fetched::new(token).with_lifetime(MINUTE))
        }
    });
    let jwts = Refreshing::with_policy(source, RefreshPolicy::new().with_clock(clock()));
    for number in 1..4 {
        let _ = tokio::time::timeout(SECOND / 2, jwts.token()).await.unwrap_err();
        sleep(SECOND).await;
        assert_eq!(jwts.current().unwrap().expose_secret(), format!("of-refresh-token-{number}"));
        sleep(MINUTE).await;
    }
    assert_eq!((*next.lock().unwrap(), &*spent.lock().unwrap()), (4, &vec![1, 2, 3]));
}

/// F4: a waiter's deadline ends that waiter alone; the timeout releases all others, and a late answer changes nothing.
#[tokio::test(start_paused = true)]
async fn timed_out_refresh_releases_all_waiters() {
    // Counts its drops.
    struct DropCounter(Arc<AtomicUsize>);
    impl Drop for DropCounter {
        fn drop(&mut self) {
            self.0.fetch_add(1, SeqCst);
        }
    }
    let (fetches, dropped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counter, drops) = (Arc::clone(&fetches), Arc::clone(&dropped));
    let source = source_fn(move |_: Reason<Token>| {
        let (number, guard) = (counter.fetch_add(1, SeqCst) + 1, DropCounter(Arc::clone(&drops)));
        async move {
            let _guard = guard;
            // The first fetch would answer after a minute.
            sleep(if number == 1 { MINUTE } else { SECOND }).await;
            let fetched = Fetched::new(Token::new(format!("token-{number}"))?);
            Ok::<_, BoxError>(fetched.with_lifetime(10 * MINUTE))
        }
    });
    let policy = RefreshPolicy::new().with_clock(clock()).with_timeout(5 * SECOND);
    let jwts = Refreshing::with_policy(source, policy);
    let began = Instant::now();
    // The deadline of a waiter does not cancel the refresh.
    let impatient: Vec<_> = (1..5).map(|time| tokio::time::timeout(time * SECOND, jwts.token())).collect();
    let patient: Vec<_> = (0..100)
        .map(|_| {
            let jwts = jwts.clone();
            tokio::spawn(async move { jwts.token().await })
        })
        .collect();
    for caller in impatient {
        assert!(caller.await.is_err(), "the waiter's own deadline must end its wait");
        assert_eq!((fetches.load(SeqCst), dropped.load(SeqCst)), (1, 0));
    }
    let mut causes = HashSet::new();
    for caller in patient {
        let error = caller.await.unwrap().unwrap_err();
        assert_eq!((error.kind(), began.elapsed()), (AuthErrorKind::RefreshFailed, 5 * SECOND));
        let cause = std::error::Error::source(&error).expect("a cause");
        assert!(cause.to_string().contains("did not answer within 5s"), "{cause}");
        causes.insert(std::ptr::from_ref(cause).cast::<()>().addr());
    }
    assert_eq!((causes.len(), dropped.load(SeqCst)), (1, 1));
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    sleep(2 * MINUTE).await;
    assert_eq!((text(&jwts).await.unwrap().as_str(), fetches.load(SeqCst)), ("token-2", 2));
}
