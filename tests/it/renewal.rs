//! R1 to R3 and R6: when a token is renewed, seen by those who want one. Time is paused.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, UNIX_EPOCH},
};

use tokio::time::{Instant, advance, sleep};
use tower_selam::{
    ApiKey, AuthErrorKind, BoxError, RefreshPolicy, Refreshing, Token,
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
    let began = Instant::now();
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

const MILLI: Duration = Duration::from_millis(1);

/// How long before the end of its token an engine renews it beside, and how long before callers wait for that.
struct Windows {
    first: Answer,
    lives: Duration,
    takes: Duration,
    policy: RefreshPolicy,
    advisory: Duration,
    mandatory: Duration,
}

impl Windows {
    fn new(lives: Duration, advisory: Duration, mandatory: Duration) -> Self {
        let (takes, policy) = (Duration::from_millis(1), RefreshPolicy::new());
        Self { first: Answer::Lives(lives), lives, takes, policy, advisory, mandatory }
    }

    /// What a caller gets that comes so long before the end, and whether it waited.
    async fn at(&self, before: Duration) -> (&'static str, usize) {
        let mint = Mint::default().taking(self.takes).then(self.first.clone());
        let policy = self.policy.clone().with_jitter(0.0).with_clock(clock());
        let jwts = Refreshing::with_policy(mint.clone(), policy);
        let first = jwts.token().await.unwrap();
        advance(self.lives - before).await;
        let began = Instant::now();
        let second = jwts.token().await.unwrap();
        settle().await;
        let waited = began.elapsed() >= self.takes;
        assert_eq!(waited, first.expose_secret() != second.expose_secret(), "the old one is served at once");
        (if waited { "waits" } else { "served" }, mint.asked())
    }
}

#[tokio::test(start_paused = true)]
async fn r1_r2_the_windows_scale_to_the_lifetime() {
    let ms = |count: u32| count * MILLI;
    let day = 24 * 60 * MINUTE;
    let (hour, policy) = (60 * MINUTE, RefreshPolicy::new);
    // Of sixty seconds, thirty are left: out of a cache.
    let cached = jwt_claiming(r#"{"iat":1899999970,"exp":1900000030.001}"#);
    for windows in [
        Windows::new(SECOND, ms(500), ms(50)),
        Windows::new(5 * SECOND, SECOND, ms(100)),
        Windows::new(MINUTE, 6 * SECOND, ms(600)),
        Windows::new(20 * MINUTE, 2 * MINUTE, 10 * SECOND),
        Windows::new(hour, 5 * MINUTE, 10 * SECOND),
        Windows::new(30 * day, 5 * MINUTE, 10 * SECOND),
        // Enough for a renewal that takes as long as the last one did.
        Windows { takes: 5 * SECOND, ..Windows::new(MINUTE, 10 * SECOND, SECOND) },
        Windows { takes: 25 * SECOND, ..Windows::new(MINUTE, 30 * SECOND, 3 * SECOND) },
        Windows { policy: policy().with_advisory_window(MINUTE), ..Windows::new(hour, MINUTE, 6 * SECOND) },
        Windows { policy: policy().with_mandatory_window(SECOND), ..Windows::new(hour, 5 * MINUTE, SECOND) },
        Windows { first: Answer::Bare(cached), ..Windows::new(30 * SECOND, 6 * SECOND, ms(600)) },
    ] {
        let Windows { lives, advisory, mandatory, .. } = windows;
        assert_eq!(
            windows.at(advisory + ms(1)).await,
            ("served", 1),
            "{lives:?}: before the advisory window"
        );
        assert_eq!(windows.at(advisory).await, ("served", 2), "{lives:?}: in it");
        assert_eq!(windows.at(mandatory + ms(1)).await, ("served", 2), "{lives:?}: at its end");
        assert_eq!(windows.at(mandatory).await, ("waits", 2), "{lives:?}: in the mandatory window");
        assert_eq!(windows.at(Duration::ZERO).await, ("waits", 2), "{lives:?}: expired");
    }
}

#[tokio::test(start_paused = true)]
async fn r1_a_renewal_that_ran_beside_is_waited_for_once_the_window_is_mandatory() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    mint.takes(6 * SECOND);
    advance(54 * SECOND).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    settle().await;
    advance(Duration::from_millis(5_399)).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    advance(Duration::from_millis(1)).await;
    let began = Instant::now();
    let callers: Vec<_> = (0..100)
        .map(|_| {
            let jwts = jwts.clone();
            tokio::spawn(async move { text(&jwts).await })
        })
        .collect();
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap(), "token-2");
    }
    assert_eq!((began.elapsed().as_millis(), mint.asked()), (600, 2));
}

#[tokio::test]
async fn r1_a_fresh_token_allocates_nothing() {
    let jwts = Refreshing::new(Mint::default());
    jwts.prefetch().await.unwrap();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let counted = allocation_counter::measure(|| {
        let call = std::pin::pin!(jwts.token());
        assert!(call.poll(&mut context).is_ready());
    });
    assert_eq!(counted.count_total, 0);
}

#[tokio::test(start_paused = true)]
async fn r2_a_token_is_renewed_about_once_in_its_lifetime_however_long_that_is() {
    // Below ten seconds the advisory window is a second, and below two half of the lifetime.
    for (lives, most) in [
        (Duration::from_millis(200), 20),
        (SECOND, 20),
        (2 * SECOND, 20),
        (10 * SECOND, 12),
        (MINUTE, 12),
        (60 * MINUTE, 12),
        (30 * 24 * 60 * MINUTE, 11),
    ] {
        let mint = Mint::default().then_always(Answer::Lives(lives));
        let (jwts, _) = engine(&mint);
        for _ in 0..1_000 {
            text(&jwts).await.unwrap();
            advance(lives / 100).await;
        }
        assert!((10..=most).contains(&mint.asked()), "{} renewals in ten of {lives:?}", mint.asked());
    }
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
        let jwts = Refreshing::with_policy(busy, RefreshPolicy::new().with_clock(clock));
        let error = jwts.token().await.unwrap_err();
        assert_eq!((error.kind(), mint.asked()), (AuthErrorKind::RefreshFailed, 1), "{lives:?}");
        assert!(error.to_string().contains("about to"), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn r3_a_token_for_its_whole_lifetime_makes_no_hot_loop() {
    for lasting in [MINUTE, MINUTE - Duration::from_millis(1), MINUTE - SECOND / 2] {
        let mint = Mint::default().then_always(Answer::Lives(MINUTE)).then(Answer::Refused);
        let clock = clock();
        let busy = Busy { mint: mint.clone(), clock: clock.clone(), passes: Duration::from_millis(100) };
        let jwts = Refreshing::with_policy(busy, RefreshPolicy::new().with_clock(clock));
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
    let policy = RefreshPolicy::new().with_jitter(0.0).with_clock(clock);
    let jwts = Refreshing::with_policy(source, policy);
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
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
        advance(Duration::from_millis(100)).await;
    }
    assert!((5..=12).contains(&mint.asked()), "{} calls in two", mint.asked());
}

/// How long after their token came engines renew it, with a request every so often.
async fn renewals(policy: &RefreshPolicy, fleet: usize) -> Vec<Duration> {
    let engines: Vec<_> = (0..fleet)
        .map(|_| {
            let mint = Mint::default();
            (Refreshing::with_policy(mint.clone(), policy.clone().with_clock(clock())), mint)
        })
        .collect();
    for (jwts, _) in &engines {
        jwts.prefetch().await.unwrap();
    }
    advance(47_900 * MILLI).await;
    for _ in 0..=62 {
        for (jwts, _) in &engines {
            text(jwts).await.unwrap();
        }
        settle().await;
        advance(100 * MILLI).await;
    }
    engines.iter().map(|(_, mint)| *mint.pauses().first().expect("a renewal")).collect()
}

#[tokio::test(start_paused = true)]
async fn r6_a_fleet_that_was_started_at_once_does_not_renew_at_once() {
    // The window is six seconds: by default they begin up to 1.2 earlier, and with all of the jitter up to 6.
    for (policy, widest, most) in
        [(RefreshPolicy::new(), 1_200, 60), (RefreshPolicy::new().with_jitter(1.0), 6_000, 25)]
    {
        let mut renewals = renewals(&policy, 300).await;
        renewals.sort();
        let (first, last) = (renewals[0], renewals[299]);
        assert!(first >= (54_000 - widest) * MILLI && last <= 54_100 * MILLI, "{first:?} to {last:?}");
        assert!(last - first >= widest * MILLI * 9 / 10, "{first:?} to {last:?}");
        let peak = renewals.chunk_by(|one, next| one == next).map(<[_]>::len).max();
        assert!(peak <= Some(most), "{peak:?} in a tenth of a second");
    }
}

#[tokio::test(start_paused = true)]
async fn r6_without_jitter_all_renew_in_time_and_nonsense_is_no_more_than_all_of_it() {
    for jitter in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE] {
        let renewals = renewals(&RefreshPolicy::new().with_jitter(jitter), 20).await;
        assert!(renewals.iter().all(|after| *after == 54_000 * MILLI), "{jitter}: {renewals:?}");
    }
    let renewals = renewals(&RefreshPolicy::new().with_jitter(1e300), 20).await;
    assert!(renewals.iter().all(|after| (48_000 * MILLI..=54_000 * MILLI).contains(after)), "{renewals:?}");
}

#[tokio::test(start_paused = true)]
async fn r6_jitter_only_ever_makes_it_earlier() {
    for _ in 0..50 {
        let mint = Mint::default();
        let jwts = Refreshing::with_policy(mint.clone(), RefreshPolicy::new().with_jitter(1.0));
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
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        Ok::<_, BoxError>(ApiKey::new("sk-selam-the-only-one")?)
    }));
    let key = keys.api_key().await.unwrap();
    keys.invalidate(&key);
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-the-only-one");
}
