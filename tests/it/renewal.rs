//! R1 to R3 and R6: when a token is renewed, seen by those who want one. Time is paused.

use std::time::Duration;

use tokio::time::{advance, sleep};
use tower_selam::{
    ApiKey, AuthErrorKind, BoxError, RenewalPolicy, Renewing,
    source::{Reason, source_fn},
};

use crate::mint::{Answer, MINUTE, Mint, SECOND, engine, settle, text};

#[tokio::test(start_paused = true)]
async fn r1_the_old_token_is_served_while_the_renewal_runs_beside() {
    let mint = Mint::default().taking(Duration::from_millis(200));
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    // A tenth of a minute before its end.
    advance(Duration::from_millis(53_900)).await;
    assert_eq!((text(&jwts).await.unwrap(), mint.asked()), ("token-1".into(), 1));
    advance(Duration::from_millis(200)).await;
    let began = tokio::time::Instant::now();
    for _ in 0..100 {
        assert_eq!(text(&jwts).await.unwrap(), "token-1");
    }
    assert_eq!(began.elapsed(), Duration::ZERO, "nobody waited");
    sleep(Duration::from_millis(201)).await;
    assert_eq!((text(&jwts).await.unwrap(), mint.asked()), ("token-2".into(), 2));
    assert_eq!(mint.reasons(), ["first", "expiring token-1"]);
}

#[tokio::test(start_paused = true)]
async fn r1_in_the_mandatory_window_callers_wait() {
    let mint = Mint::default().taking(Duration::from_millis(50));
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    advance(Duration::from_millis(59_500)).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    advance(MINUTE).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-3", "and when it has expired");
}

#[tokio::test]
async fn r1_a_fresh_token_allocates_nothing() {
    let jwts = Renewing::new(Mint::default());
    jwts.prefetch().await.unwrap();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let counted = allocation_counter::measure(|| {
        let call = std::pin::pin!(jwts.token());
        assert!(call.poll(&mut context).is_ready());
    });
    assert_eq!(counted.count_total, 0);
}

#[tokio::test(start_paused = true)]
async fn r2_a_token_of_a_minute_is_renewed_about_once_a_minute() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    for _ in 0..6_000 {
        text(&jwts).await.unwrap();
        advance(Duration::from_millis(100)).await;
    }
    assert!((10..=13).contains(&mint.asked()), "{} renewals in ten minutes", mint.asked());
}

#[tokio::test(start_paused = true)]
async fn r3_the_same_an_older_or_an_expired_token_makes_no_hot_loop() {
    for answer in [
        Answer::Same("token-1", SECOND),
        Answer::Same("older", SECOND),
        Answer::Same("expired", Duration::ZERO),
    ] {
        let mint = Mint::default().then(Answer::Lives(MINUTE)).then_always(answer);
        let (jwts, _) = engine(&mint);
        jwts.prefetch().await.unwrap();
        advance(Duration::from_millis(54_500)).await;
        for _ in 0..400 {
            assert_eq!(text(&jwts).await.unwrap(), "token-1", "no worse one");
            advance(Duration::from_millis(10)).await;
        }
        assert!((2..=10).contains(&mint.asked()), "{} calls in four seconds", mint.asked());
    }
}

#[tokio::test(start_paused = true)]
async fn r6_jitter_only_ever_makes_it_earlier() {
    for _ in 0..50 {
        let mint = Mint::default();
        let jwts = Renewing::with_policy(mint.clone(), RenewalPolicy::new().with_jitter(1.0));
        jwts.prefetch().await.unwrap();
        // The window is six seconds, so it begins between 48 and 54.
        advance(Duration::from_millis(47_900)).await;
        let _ = text(&jwts).await;
        settle().await;
        assert_eq!(mint.asked(), 1);
        advance(Duration::from_millis(6_200)).await;
        let _ = text(&jwts).await;
        settle().await;
        assert_eq!(mint.asked(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn an_invalidated_token_is_replaced_and_only_if_it_is_still_the_present_one() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    let first = jwts.token().await.unwrap();
    jwts.invalidate(&first);
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    jwts.invalidate(&first);
    assert_eq!((text(&jwts).await.unwrap(), mint.asked()), ("token-2".into(), 2));
    assert_eq!(mint.reasons(), ["first", "rejected token-1"]);
}

#[tokio::test(start_paused = true)]
async fn a_token_for_longer_than_the_present_one_is_fetched_and_for_too_long_is_refused() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    advance(30 * SECOND).await;
    let token = jwts.token_valid_for(40 * SECOND).await.unwrap();
    assert_eq!(token.expose_secret(), "token-2");
    for _ in 0..10 {
        let error = jwts.token_valid_for(2 * MINUTE).await.unwrap_err();
        assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
    }
    assert_eq!(mint.asked(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_was_refused_is_used_on_when_there_is_no_other() {
    let keys = Renewing::new(source_fn(|_: Reason<ApiKey>| async {
        Ok::<_, BoxError>(ApiKey::new("sk-selam-the-only-one")?)
    }));
    let key = keys.api_key().await.unwrap();
    keys.invalidate(&key);
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-the-only-one");
}
