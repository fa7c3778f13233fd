//! F1 to F8: one renewal for all who want a token, whatever becomes of them and of it.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::sleep;
use tower_selam::{
    AuthError, AuthErrorKind, BoxError, Renewing, Token,
    source::{Reason, source_fn},
};

use crate::mint::{Answer, MINUTE, Mint, SECOND, engine, settle, text};

#[tokio::test(start_paused = true)]
async fn f1_f2_ten_thousand_callers_cause_one_renewal_and_share_its_error() {
    for answer in [Answer::Lives(MINUTE), Answer::Fails(None)] {
        let mint = Mint::default().taking(Duration::from_millis(50)).then(answer.clone());
        let (jwts, _) = engine(&mint);
        let callers: Vec<_> = (0..10_000)
            .map(|_| {
                let jwts = jwts.clone();
                tokio::spawn(async move { jwts.token().await })
            })
            .collect();
        let mut causes = std::collections::HashSet::new();
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

#[tokio::test(start_paused = true)]
async fn f3_the_renewal_completes_when_its_callers_are_gone() {
    let mint = Mint::default().taking(SECOND);
    let (jwts, _) = engine(&mint);
    for _ in 0..3 {
        let waited = tokio::time::timeout(Duration::from_millis(100), jwts.token()).await;
        assert!(waited.is_err(), "dropped while it waits");
    }
    sleep(SECOND).await;
    assert_eq!(jwts.current().unwrap().expose_secret(), "token-1");
    assert_eq!(mint.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn f4_a_renewal_that_hangs_ends_at_its_timeout() {
    let mint = Mint::default().then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let began = tokio::time::Instant::now();
    let error = jwts.token().await.unwrap_err();
    assert_eq!(began.elapsed(), Duration::from_secs(30));
    assert_eq!(error.kind(), AuthErrorKind::RenewalFailed);
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
}

#[tokio::test(start_paused = true)]
async fn f5_a_source_that_panics_is_an_error_and_the_next_call_works() {
    let mint = Mint::default().then(Answer::Panics);
    let (jwts, _) = engine(&mint);
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RenewalFailed);
    assert!(!format!("{error} {error:?}").contains("secret"));
    sleep(2 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
}

#[test]
fn f5_without_a_runtime_it_is_a_typed_error_and_another_runtime_takes_over() {
    let jwts = Renewing::new(source_fn(|_: Reason<Token>| async {
        tokio::task::yield_now().await;
        Ok::<_, BoxError>(Token::new("a-token")?)
    }));
    let error = tokio_test::task::spawn(jwts.token()).poll();
    assert!(
        matches!(error, std::task::Poll::Ready(Err(error)) if error.kind() == AuthErrorKind::RenewalFailed)
    );

    // Its renewal is dropped with the runtime that ran it.
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let jwts = Renewing::new(Mint::default());
    let first = runtime();
    let _ = first.block_on(async { tokio::time::timeout(Duration::ZERO, jwts.token()).await });
    drop(first);
    assert_eq!(runtime().block_on(text(&jwts)).unwrap().split('-').next(), Some("token"));
}

#[tokio::test(start_paused = true)]
async fn f6_the_last_handle_dropped_ends_the_task() {
    let mint = Mint::default().then(Answer::Hangs);
    let (jwts, _) = engine(&mint);
    let _ = tokio::time::timeout(SECOND, jwts.token()).await;
    assert_eq!(Arc::strong_count(&mint.asked), 2, "the engine has the other");
    drop(jwts);
    settle().await;
    assert_eq!(Arc::strong_count(&mint.asked), 1);
}

#[tokio::test(start_paused = true)]
async fn f7_a_source_that_asks_for_its_own_token_is_told_so() {
    let slot: Arc<Mutex<Option<Renewing<Token>>>> = Arc::default();
    let own = Arc::clone(&slot);
    let jwts = Renewing::new(source_fn(move |_: Reason<Token>| {
        let own = own.lock().unwrap().clone().unwrap();
        async move { own.token().await.map_err(BoxError::from) }
    }));
    *slot.lock().unwrap() = Some(jwts.clone());
    let began = tokio::time::Instant::now();
    let error = jwts.token().await.unwrap_err();
    assert_eq!(began.elapsed(), Duration::ZERO, "no deadlock until a timeout");
    let own = AuthError::find(std::error::Error::source(&error).unwrap()).unwrap().to_string();
    assert!(own.contains("waits for the credential itself"), "{own}");
    *slot.lock().unwrap() = None;
}
