//! R4 and R5: what tokens say of their lifetime, and clocks that jump. Time is paused.

use std::time::{Duration, UNIX_EPOCH};

use tokio::time::advance;
use tower_selam::{
    AuthErrorKind, BoxError, RenewalPolicy, Renewing, Token,
    source::{Reason, source_fn},
};

use crate::mint::{Answer, MINUTE, Mint, SECOND, engine, text};

#[tokio::test(start_paused = true)]
async fn r4_a_token_without_an_expiry_is_not_for_ever() {
    let source = || source_fn(|_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("opaque")?) });
    let jwts = Renewing::new(source());
    jwts.prefetch().await.unwrap();
    assert!(jwts.expires_at().is_some());
    let strict = Renewing::with_policy(source(), RenewalPolicy::new().require_expiry());
    let error = strict.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RenewalFailed);
    assert!(error.to_string().contains("does not say when it expires"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn r4_no_lifetime_makes_it_panic() {
    for lives in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
        let (jwts, _) = engine(&Mint::default().then(Answer::Lives(lives)));
        let _ = jwts.token().await;
        assert!(jwts.expires_at().is_none_or(|at| at < UNIX_EPOCH + Duration::from_secs(3_000_000_000)));
    }
}

#[tokio::test(start_paused = true)]
async fn r5_no_jump_of_the_wall_clock_makes_a_storm_or_sends_an_expired_token() {
    let mint = Mint::default();
    let (jwts, clock) = engine(&mint);
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    clock.jump_back(60 * MINUTE);
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    advance(MINUTE + SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2", "though the wall clock says it is early");
    clock.jump(60 * MINUTE);
    for _ in 0..100 {
        assert_eq!(text(&jwts).await.unwrap(), "token-3");
    }
    // Suspended for eight hours.
    clock.jump(8 * 60 * MINUTE);
    for _ in 0..100 {
        assert_eq!(text(&jwts).await.unwrap(), "token-4");
    }
    assert_eq!(mint.asked(), 4);
}
