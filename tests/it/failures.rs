//! W1 to W3: failed refreshes. Time is paused.

use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use tokio::time::{advance, sleep};
use tower::{Layer, Service, ServiceExt};
use tower_selam::{ApiKeyLayer, AuthError, AuthErrorKind, JwtLayer, RefreshLayer};

use crate::{
    api::{Api, request},
    mint::{Answer, MINUTE, Mint, SECOND, engine, settle, spawn_callers, text},
    support::key,
};

/// W1: every request succeeds while the old token is valid, and the back-off grows with jitter.
#[tokio::test(start_paused = true)]
async fn valid_token_is_served_during_backoff() {
    let mut all = Vec::new();
    for _ in 0..4 {
        let mint = Mint::default().then(Answer::Lives(60 * MINUTE)).then_always(Answer::Fails(None));
        let (jwts, _) = engine(&mint);
        jwts.prefetch().await.unwrap();
        advance(55 * MINUTE).await;
        // Until it expires, the mandatory window included.
        for _ in 0..3_000 {
            assert_eq!(text(&jwts).await.unwrap(), "token-1");
            advance(SECOND / 10).await;
        }
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
        let pauses = mint.pauses().split_off(1);
        assert!((7..=14).contains(&pauses.len()), "{pauses:?}");
        for (pause, limit) in pauses.iter().zip([1, 2, 4, 8, 16, 32, 60].into_iter().chain([60; 9])) {
            let limit = limit * SECOND;
            assert!((limit / 2..=limit + SECOND / 4).contains(pause), "{pauses:?}");
        }
        all.push(pauses);
    }
    assert!(all[1..].iter().any(|pauses| pauses[4] != all[0][4]), "jitter varies between engines: {all:?}");
}

/// W1: also in the mandatory window.
#[tokio::test(start_paused = true)]
async fn requests_never_wait_after_a_failure() {
    let mint = Mint::default().taking(4 * SECOND).then(Answer::Lives(60 * MINUTE));
    let mint = mint.then_always(Answer::Fails(None));
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    advance(55 * MINUTE).await;
    // Each refresh takes four seconds; the last ten seconds are the mandatory window.
    for _ in 0..299 {
        let start = tokio::time::Instant::now();
        assert_eq!(text(&jwts).await.unwrap(), "token-1");
        assert_eq!(start.elapsed(), Duration::ZERO);
        sleep(SECOND).await;
    }
    assert!(mint.asked() > 5, "{}", mint.asked());
}

/// W1: without a token.
#[tokio::test(start_paused = true)]
async fn retry_after_is_honoured() {
    let mint = Mint::default().then(Answer::Fails(Some(MINUTE)));
    let (jwts, _) = engine(&mint);
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.retry_after(), Some(MINUTE));
    assert!(error.to_string().ends_with("; next attempt in 60.0s at the earliest"), "{error}");
    advance(59 * SECOND).await;
    assert_eq!(error.retry_after(), Some(SECOND), "it counts down");
    assert!(error.to_string().ends_with("; next attempt in 1.0s at the earliest"), "{error}");
    assert_eq!((text(&jwts).await, mint.asked()), (Err(AuthErrorKind::RefreshFailed), 1));
    advance(SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    assert_eq!(error.retry_after(), Some(Duration::ZERO));
    assert!(!error.to_string().contains("next attempt"), "{error}");
}

/// W1: while the old token is valid; bounded below by a second and above by an hour.
#[tokio::test(start_paused = true)]
async fn retry_after_is_clamped() {
    for (retry_after, wait) in
        [(20 * SECOND, 20 * SECOND), (Duration::ZERO, SECOND), (Duration::MAX, 60 * MINUTE)]
    {
        let mint = Mint::default().then(Answer::Lives(1_000 * MINUTE)).then(Answer::Fails(Some(retry_after)));
        let (jwts, _) = engine(&mint);
        jwts.prefetch().await.unwrap();
        advance(996 * MINUTE).await;
        for (pause, asked) in [(Duration::ZERO, 2), (wait - SECOND / 2, 2), (SECOND / 2, 3)] {
            advance(pause).await;
            if wait < MINUTE || asked == 2 && pause.is_zero() {
                assert_eq!(text(&jwts).await.unwrap(), "token-1", "{retry_after:?}");
            } else {
                let _ = text(&jwts).await;
            }
            settle().await;
            assert_eq!(mint.asked(), asked, "{retry_after:?}");
        }
    }
}

/// W2: until the version of the source changes, it is called every five minutes only.
#[tokio::test(start_paused = true)]
async fn permanent_failure_lasts_until_version_changes() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then_always(Answer::Refused);
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    advance(55 * SECOND).await;
    for _ in 0..40 {
        assert_eq!(text(&jwts).await.unwrap(), "token-1", "served until it expires");
        advance(Duration::from_millis(100)).await;
    }
    advance(MINUTE).await;
    for _ in 0..300 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshRejected));
        advance(SECOND).await;
    }
    assert!(mint.asked() <= 3, "{}", mint.asked());
    for _ in 0..100 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshRejected));
        advance(MINUTE).await;
    }
    assert!(mint.pauses()[1..].iter().all(|pause| *pause >= 5 * MINUTE), "{:?}", mint.pauses());
    let asked = mint.asked();
    assert!((20..=24).contains(&asked), "{asked}");
    mint.clear();
    mint.version.store(1, SeqCst);
    assert_eq!(text(&jwts).await.unwrap(), format!("token-{}", asked + 1));
}

/// W2: a permanent failure that was none after all, as when the database of an issuer is down, ends by itself.
#[tokio::test(start_paused = true)]
async fn permanent_failure_is_probed() {
    for valid in [false, true] {
        let mut mint = Mint::default();
        if valid {
            mint = mint.then(Answer::Lives(MINUTE));
        }
        let mint = mint.then(Answer::Refused).then(Answer::Refused);
        let (jwts, _) = engine(&mint);
        if valid {
            jwts.prefetch().await.unwrap();
            advance(MINUTE).await;
        }
        for _ in 0..600 {
            let error = jwts.token().await.unwrap_err();
            assert_eq!((error.kind(), error.retry_after()), (AuthErrorKind::RefreshRejected, None));
            advance(SECOND).await;
        }
        assert!(text(&jwts).await.is_ok());
        assert_eq!(mint.asked(), 3 + usize::from(valid));
    }
}

/// W2: while the old token is valid.
#[tokio::test(start_paused = true)]
async fn version_change_is_noticed_within_a_second() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then(Answer::Refused);
    let (jwts, _) = engine(&mint);
    let api = Api::accepting_all();
    let service = (JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service());
    let send = || async { service.clone().oneshot(request()).await.map(|_| ()) };
    send().await.unwrap();
    advance(55 * SECOND).await;
    for _ in 0..20 {
        send().await.unwrap();
        advance(SECOND / 10).await;
    }
    assert_eq!(mint.asked(), 2);
    mint.version.store(1, SeqCst);
    advance(SECOND).await;
    send().await.unwrap();
    settle().await;
    send().await.unwrap();
    let bearers = api.bearers();
    assert_eq!((bearers.len(), bearers.iter().filter(|sent| *sent == "token-1").count()), (23, 22));
    assert_eq!((bearers.last().unwrap().as_str(), mint.asked()), ("token-3", 3));
}

/// W3: requests fail at once during back-off.
#[tokio::test(start_paused = true)]
async fn first_success_ends_backoff() {
    let mint = Mint::default().then(Answer::Fails(None));
    let (jwts, _) = engine(&mint);
    for _ in 0..100 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
    }
    assert_eq!(mint.asked(), 1);
    advance(SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    advance(MINUTE).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-3", "the back-off has ended");
}

/// W3: requests wait for a refresh that is in flight after a failure.
#[tokio::test(start_paused = true)]
async fn requests_join_the_refresh_in_flight() {
    let mint = Mint::default().taking(SECOND).then(Answer::Fails(None));
    let (jwts, _) = engine(&mint);
    assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
    advance(SECOND).await;
    let callers = spawn_callers(&jwts, 10);
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap(), "token-2");
    }
    assert_eq!(mint.asked(), 2);
}

/// W3: a success resets the back-off.
#[tokio::test(start_paused = true)]
async fn backoff_restarts_after_a_success() {
    let mint = (0..4).fold(Mint::default(), |mint, _| mint.then(Answer::Fails(None)));
    let mint = mint.then(Answer::Lives(SECOND)).then_always(Answer::Fails(None));
    let (jwts, _) = engine(&mint);
    while mint.asked() < 8 {
        let _ = text(&jwts).await;
        advance(SECOND / 100).await;
    }
    let pauses = mint.pauses();
    assert!(pauses[3] > 3 * SECOND, "the fourth back-off: {pauses:?}");
    assert!(pauses[5] <= SECOND + SECOND / 100, "the back-off restarts: {pauses:?}");
}

/// W2, W3: without a token, nothing is sent and the source is not called again.
#[tokio::test(start_paused = true)]
async fn requests_fail_at_once_without_a_token() {
    for (answer, kind) in [
        (Answer::Fails(Some(MINUTE)), AuthErrorKind::RefreshFailed),
        (Answer::Refused, AuthErrorKind::RefreshRejected),
    ] {
        let mint = Mint::default().then(answer);
        let (jwts, _) = engine(&mint);
        let api = Api::accepting_all();
        let mut service = RefreshLayer::new()
            .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(api.service()));
        for _ in 0..100 {
            let start = tokio::time::Instant::now();
            let error = service.ready().await.unwrap().call(request()).await.unwrap_err();
            assert_eq!(AuthError::find(&*error).unwrap().kind(), kind);
            assert_eq!(start.elapsed(), Duration::ZERO, "at once");
            advance(SECOND / 2).await;
        }
        assert_eq!((api.bearers().len(), mint.asked()), (0, 1));
        mint.version.store(1, SeqCst);
        advance(MINUTE).await;
        service.ready().await.unwrap().call(request()).await.unwrap();
        assert_eq!(api.bearers(), ["token-2"]);
    }
}
