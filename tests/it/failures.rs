//! W1 to W3: renewals that fail. Time is paused.

use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use tokio::time::advance;
use tower_selam::AuthErrorKind;

use crate::mint::{Answer, MINUTE, Mint, SECOND, engine, text};

#[tokio::test(start_paused = true)]
async fn w1_while_the_old_token_is_valid_no_request_fails_and_back_off_grows() {
    let mint = Mint::default().then(Answer::Lives(60 * MINUTE)).then_always(Answer::Fails(None));
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    advance(55 * MINUTE).await;
    for _ in 0..290 {
        assert_eq!(text(&jwts).await.unwrap(), "token-1");
        advance(SECOND).await;
    }
    // 1, 2, 4, 8, 16, 32, 60, 60, … less up to a half each.
    assert!((8..=16).contains(&mint.asked()), "{} calls", mint.asked());
}

#[tokio::test(start_paused = true)]
async fn w1_retry_after_is_honoured() {
    let mint = Mint::default().then(Answer::Fails(Some(MINUTE)));
    let (jwts, _) = engine(&mint);
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.retry_after(), Some(MINUTE));
    advance(59 * SECOND).await;
    assert_eq!((text(&jwts).await, mint.asked()), (Err(AuthErrorKind::RenewalFailed), 1));
    advance(SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
}

#[tokio::test(start_paused = true)]
async fn w2_after_a_permanent_failure_the_source_is_left_alone_until_it_changes() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then(Answer::Refused);
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    advance(55 * SECOND).await;
    for _ in 0..40 {
        assert_eq!(text(&jwts).await.unwrap(), "token-1", "served to its end");
        advance(Duration::from_millis(100)).await;
    }
    advance(MINUTE).await;
    for _ in 0..100 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RenewalRefused));
        advance(MINUTE).await;
    }
    assert_eq!(mint.asked(), 2);
    mint.version.store(1, SeqCst);
    assert_eq!(text(&jwts).await.unwrap(), "token-3");
}

#[tokio::test(start_paused = true)]
async fn w3_during_back_off_requests_fail_at_once_and_success_ends_it() {
    let mint = Mint::default().then(Answer::Fails(None));
    let (jwts, _) = engine(&mint);
    for _ in 0..100 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RenewalFailed));
    }
    assert_eq!(mint.asked(), 1);
    advance(SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    advance(MINUTE).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-3", "no back-off is left");
}
