//! R1 to R3 and R6: when a token is renewed, seen by those who want one. Time is paused.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, UNIX_EPOCH},
};

use tokio::time::{advance, sleep};
use tower_selam::{
    ApiKey, AuthErrorKind, BoxError, RenewalPolicy, Renewing, Token,
    source::{Reason, source_fn},
};

use crate::{
    mint::{Answer, Busy, MINUTE, Mint, SECOND, clock, engine, settle, text},
    support::jwt_claiming,
};

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
async fn r3_a_token_that_is_gone_before_it_can_be_sent_makes_no_hot_loop() {
    for lives in [Duration::from_nanos(1), Duration::from_millis(1), Duration::from_millis(50)] {
        let mint = Mint::default().then_always(Answer::Lives(lives));
        let clock = clock();
        let busy = Busy { mint: mint.clone(), clock: clock.clone(), passes: Duration::from_millis(60) };
        let jwts = Renewing::with_policy(busy, RenewalPolicy::new().with_clock(clock));
        let error = jwts.token().await.unwrap_err();
        assert_eq!((error.kind(), mint.asked()), (AuthErrorKind::RenewalFailed, 1), "{lives:?}");
        assert!(error.to_string().contains("about to"), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn r3_a_token_for_its_whole_lifetime_makes_no_hot_loop() {
    for lasting in [MINUTE, MINUTE - Duration::from_millis(1), MINUTE - SECOND / 2] {
        let mint = Mint::default().then_always(Answer::Lives(MINUTE)).then(Answer::Refused);
        let clock = clock();
        let busy = Busy { mint: mint.clone(), clock: clock.clone(), passes: Duration::from_millis(100) };
        let jwts = Renewing::with_policy(busy, RenewalPolicy::new().with_clock(clock));
        for _ in 0..10 {
            if let Err(error) = jwts.token_valid_for(lasting).await {
                assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
            }
        }
        assert_eq!(mint.asked(), 1, "{lasting:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn r3_tokens_that_are_old_when_they_come_make_no_hot_loop() {
    // Of ten seconds, with the last one about to begin: by an issuer whose clock is behind, or out of a cache.
    let (clock, asked) = (clock(), Arc::new(AtomicUsize::new(0)));
    let (now, counter) = (clock.clone(), Arc::clone(&asked));
    let source = source_fn(move |_: Reason<Token>| {
        counter.fetch_add(1, SeqCst);
        let now = now.now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let claims = format!(r#"{{"iat":{},"exp":{}}}"#, now - 8.995, now + 1.005);
        async move { Ok::<_, BoxError>(jwt_claiming(&claims)) }
    });
    let policy = RenewalPolicy::new().with_jitter(0.0).with_clock(clock);
    let jwts = Renewing::with_policy(source, policy);
    for _ in 0..400 {
        jwts.token().await.unwrap();
        advance(Duration::from_millis(10)).await;
    }
    let asked = asked.load(SeqCst);
    assert!((4..=11).contains(&asked), "{asked} calls in four seconds");
}

#[tokio::test(start_paused = true)]
async fn r3_the_same_jwt_again_is_served_to_its_end_and_then_asked_for_now_and_then() {
    let cached = jwt_claiming(r#"{"iat":1900000000,"exp":1900000060}"#);
    let mint = Mint::default().then_always(Answer::Bare(cached));
    let (jwts, _) = engine(&mint);
    for _ in 0..599 {
        jwts.token().await.unwrap();
        advance(Duration::from_millis(100)).await;
    }
    assert!((3..=7).contains(&mint.asked()), "{} calls in a minute", mint.asked());
    advance(Duration::from_millis(100)).await;
    for _ in 0..600 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RenewalFailed));
        advance(Duration::from_millis(100)).await;
    }
    assert!((5..=12).contains(&mint.asked()), "{} calls in two", mint.asked());
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
