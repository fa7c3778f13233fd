//! The engine `Refreshing`: when callers are served at once, wait, or cause a refresh (R1 to R3, R6). Time is paused.

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
    mint::{Answer, Busy, MINUTE, Mint, SECOND, clock, engine, settle, spawn_callers, text},
    support::jwt_claiming,
};

/// R1: in the advisory window the old token is served at once while one refresh runs in the background.
#[tokio::test(start_paused = true)]
async fn advisory_window_serves_the_old_token() {
    let mint = Mint::default().taking(Duration::from_millis(200));
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    // The advisory window is the last tenth of the minute: it begins at 54 s.
    advance(Duration::from_millis(53_900)).await;
    assert_eq!((text(&jwts).await.unwrap(), mint.asked()), ("token-1".into(), 1));
    advance(Duration::from_millis(200)).await;
    let started = Instant::now();
    for _ in 0..100 {
        assert_eq!(text(&jwts).await.unwrap(), "token-1");
    }
    assert_eq!(started.elapsed(), Duration::ZERO, "no caller waits");
    sleep(Duration::from_millis(201)).await;
    assert_eq!((text(&jwts).await.unwrap(), mint.asked()), ("token-2".into(), 2));
    assert_eq!(mint.reasons(), ["first", "expiring token-1"]);
}

/// R1: in the mandatory window, and after expiry, callers wait for the refresh.
#[tokio::test(start_paused = true)]
async fn mandatory_window_makes_callers_wait() {
    let mint = Mint::default().taking(Duration::from_millis(50));
    let (jwts, _) = engine(&mint);
    jwts.prefetch().await.unwrap();
    advance(Duration::from_millis(59_500)).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    advance(MINUTE).await;
    assert_eq!(text(&jwts).await.unwrap(), "token-3", "callers also wait once the token has expired");
}

const MILLI: Duration = Duration::from_millis(1);

/// A first token and the windows expected for it, both measured back from its expiry.
struct Windows {
    first: Answer,
    lifetime: Duration,
    fetch_time: Duration,
    policy: RefreshPolicy,
    advisory: Duration,
    mandatory: Duration,
}

impl Windows {
    fn new(lifetime: Duration, advisory: Duration, mandatory: Duration) -> Self {
        let (fetch_time, policy) = (MILLI, RefreshPolicy::new());
        Self { first: Answer::Lives(lifetime), lifetime, fetch_time, policy, advisory, mandatory }
    }

    /// Asks for a token this long before the first one expires: whether the caller waits, and how many fetches there
    /// were in all.
    async fn ask(&self, before_expiry: Duration) -> (&'static str, usize) {
        let mint = Mint::default().taking(self.fetch_time).then(self.first.clone());
        let policy = self.policy.clone().with_jitter(0.0).with_clock(clock());
        let jwts = Refreshing::with_policy(mint.clone(), policy);
        let first = jwts.token().await.unwrap();
        advance(self.lifetime - before_expiry).await;
        let started = Instant::now();
        let second = jwts.token().await.unwrap();
        settle().await;
        let waited = started.elapsed() >= self.fetch_time;
        assert_eq!(
            waited,
            first.expose_secret() != second.expose_secret(),
            "only a caller that waits gets a new token"
        );
        (if waited { "waits" } else { "served" }, mint.asked())
    }
}

/// R1, R2: both windows scale to the lifetime of the token and to how long a refresh takes.
#[tokio::test(start_paused = true)]
async fn windows_scale_to_the_lifetime() {
    let ms = |count: u32| count * MILLI;
    let day = 24 * 60 * MINUTE;
    let (hour, policy) = (60 * MINUTE, RefreshPolicy::new);
    // A cached token: 30 of its 60 seconds are left.
    let cached = jwt_claiming(r#"{"iat":1899999970,"exp":1900000030.001}"#);
    for windows in [
        Windows::new(SECOND, ms(500), ms(50)),
        Windows::new(5 * SECOND, SECOND, ms(100)),
        Windows::new(MINUTE, 6 * SECOND, ms(600)),
        Windows::new(20 * MINUTE, 2 * MINUTE, 10 * SECOND),
        Windows::new(hour, 5 * MINUTE, 10 * SECOND),
        Windows::new(30 * day, 5 * MINUTE, 10 * SECOND),
        // The advisory window leaves time for a refresh that takes as long as the last one did.
        Windows { fetch_time: 5 * SECOND, ..Windows::new(MINUTE, 10 * SECOND, SECOND) },
        Windows { fetch_time: 25 * SECOND, ..Windows::new(MINUTE, 30 * SECOND, 3 * SECOND) },
        Windows { policy: policy().with_advisory_window(MINUTE), ..Windows::new(hour, MINUTE, 6 * SECOND) },
        Windows { policy: policy().with_mandatory_window(SECOND), ..Windows::new(hour, 5 * MINUTE, SECOND) },
        Windows { first: Answer::Bare(cached), ..Windows::new(30 * SECOND, 6 * SECOND, ms(600)) },
    ] {
        let Windows { lifetime, advisory, mandatory, .. } = windows;
        assert_eq!(
            windows.ask(advisory + ms(1)).await,
            ("served", 1),
            "{lifetime:?}: before the advisory window"
        );
        assert_eq!(
            windows.ask(advisory).await,
            ("served", 2),
            "{lifetime:?}: at the start of the advisory window"
        );
        assert_eq!(
            windows.ask(mandatory + ms(1)).await,
            ("served", 2),
            "{lifetime:?}: at the end of the advisory window"
        );
        assert_eq!(windows.ask(mandatory).await, ("waits", 2), "{lifetime:?}: in the mandatory window");
        assert_eq!(windows.ask(Duration::ZERO).await, ("waits", 2), "{lifetime:?}: expired");
    }
}

/// R1: callers join the refresh begun in the advisory window once the mandatory window begins.
#[tokio::test(start_paused = true)]
async fn mandatory_window_joins_the_background_refresh() {
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
    let started = Instant::now();
    let callers = spawn_callers(&jwts, 100);
    for caller in callers {
        assert_eq!(caller.await.unwrap().unwrap(), "token-2");
    }
    assert_eq!((started.elapsed().as_millis(), mint.asked()), (600, 2));
}

/// R1: getting a fresh token allocates nothing.
#[tokio::test]
async fn fresh_token_allocates_nothing() {
    let jwts = Refreshing::new(Mint::default());
    jwts.prefetch().await.unwrap();
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let counted = allocation_counter::measure(|| {
        let call = std::pin::pin!(jwts.token());
        assert!(call.poll(&mut context).is_ready());
    });
    assert_eq!(counted.count_total, 0);
}

/// R2: a token is refreshed about once per lifetime, and at most twice if it lives for seconds only.
#[tokio::test(start_paused = true)]
async fn tokens_refresh_about_once_per_lifetime() {
    // The advisory window is 1 s for lifetimes below 10 s and half the lifetime below 2 s, so short-lived tokens are
    // refreshed more often.
    for (lifetime, max_refreshes) in [
        (Duration::from_millis(200), 20),
        (SECOND, 20),
        (2 * SECOND, 20),
        (10 * SECOND, 12),
        (MINUTE, 12),
        (60 * MINUTE, 12),
        (30 * 24 * 60 * MINUTE, 11),
    ] {
        let mint = Mint::default().then_always(Answer::Lives(lifetime));
        let (jwts, _) = engine(&mint);
        for _ in 0..1_000 {
            text(&jwts).await.unwrap();
            advance(lifetime / 100).await;
        }
        assert!(
            (10..=max_refreshes).contains(&mint.asked()),
            "{} fetches in ten lifetimes of {lifetime:?}",
            mint.asked()
        );
    }
}

/// R3: the same, an older or an expired token is not installed and causes no hot loop.
#[tokio::test(start_paused = true)]
async fn worse_tokens_cause_no_hot_loop() {
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
            assert_eq!(text(&jwts).await.unwrap(), "token-1", "the worse token is not installed");
            advance(Duration::from_millis(10)).await;
        }
        assert!((2..=10).contains(&mint.asked()), "{} fetches in four seconds", mint.asked());
    }
}

/// R3: a token that expires before it can be sent is an error after one fetch.
#[tokio::test(start_paused = true)]
async fn token_expired_on_arrival_fails_after_one_fetch() {
    for lives in [Duration::from_nanos(1), Duration::from_millis(1), Duration::from_millis(50)] {
        let mint = Mint::default().then_always(Answer::Lives(lives));
        let clock = clock();
        let busy = Busy { mint: mint.clone(), clock: clock.clone(), passes: Duration::from_millis(60) };
        let jwts = Refreshing::with_policy(busy, RefreshPolicy::new().with_clock(clock));
        let error = jwts.token().await.unwrap_err();
        assert_eq!((error.kind(), mint.asked()), (AuthErrorKind::RefreshFailed, 1), "{lives:?}");
        let details = ["returned an expired credential", "about to expire"];
        assert!(details.iter().any(|detail| error.to_string().contains(detail)), "{error}");
    }
}

/// R3: asking for tokens valid for (almost) their whole lifetime causes no hot loop.
#[tokio::test(start_paused = true)]
async fn demanding_the_whole_lifetime_fetches_once() {
    for min_validity in [MINUTE, MINUTE - Duration::from_millis(1), MINUTE - SECOND / 2] {
        let mint = Mint::default().then_always(Answer::Lives(MINUTE)).then(Answer::Refused);
        let clock = clock();
        let busy = Busy { mint: mint.clone(), clock: clock.clone(), passes: Duration::from_millis(100) };
        let jwts = Refreshing::with_policy(busy, RefreshPolicy::new().with_clock(clock));
        for _ in 0..10 {
            if let Err(error) = jwts.token_valid_for(min_validity).await {
                assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
            }
        }
        assert_eq!(mint.asked(), 1, "{min_validity:?}");
    }
}

/// R3: tokens that are nearly expired on arrival cause no hot loop.
#[tokio::test(start_paused = true)]
async fn tokens_old_on_arrival_cause_no_hot_loop() {
    // The tokens live 10 s and have 1.005 s left, as from a cache or from an issuer whose clock is behind.
    let (clock, fetches) = (clock(), Arc::new(AtomicUsize::new(0)));
    let (now, counter) = (clock.clone(), Arc::clone(&fetches));
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
    let fetches = fetches.load(SeqCst);
    assert!((4..=11).contains(&fetches), "{fetches} fetches in four seconds");
}

/// R3: a JWT that never changes is served until it expires; after that, fetches are spaced.
#[tokio::test(start_paused = true)]
async fn same_jwt_is_served_until_it_expires() {
    let cached = jwt_claiming(r#"{"iat":1900000000,"exp":1900000060}"#);
    let mint = Mint::default().then_always(Answer::Bare(cached));
    let (jwts, _) = engine(&mint);
    for _ in 0..599 {
        jwts.token().await.unwrap();
        advance(Duration::from_millis(100)).await;
    }
    assert!((3..=7).contains(&mint.asked()), "{} fetches in a minute", mint.asked());
    advance(Duration::from_millis(100)).await;
    for _ in 0..600 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
        advance(Duration::from_millis(100)).await;
    }
    assert!((5..=12).contains(&mint.asked()), "{} fetches in two minutes", mint.asked());
}

/// For each engine of a fleet, how long after its token arrived it refreshes it, given a request every 100 ms.
async fn refresh_times(policy: &RefreshPolicy, fleet: usize) -> Vec<Duration> {
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
    engines.iter().map(|(_, mint)| *mint.pauses().first().expect("a refresh")).collect()
}

/// R6: jitter spreads the refreshes of a fleet that started at the same moment.
#[tokio::test(start_paused = true)]
async fn jitter_spreads_a_fleet() {
    // The advisory window is 6 s. Jitter starts refreshes up to 1.2 s earlier by default, and up to 6 s earlier at 1.0.
    for (policy, spread_ms, max_peak) in
        [(RefreshPolicy::new(), 1_200, 60), (RefreshPolicy::new().with_jitter(1.0), 6_000, 25)]
    {
        let mut times = refresh_times(&policy, 300).await;
        times.sort();
        let (first, last) = (times[0], times[299]);
        assert!(first >= (54_000 - spread_ms) * MILLI && last <= 54_100 * MILLI, "{first:?} to {last:?}");
        assert!(last - first >= spread_ms * MILLI * 9 / 10, "{first:?} to {last:?}");
        let peak = times.chunk_by(|one, next| one == next).map(<[_]>::len).max();
        assert!(peak <= Some(max_peak), "{peak:?} refreshes within 100 ms");
    }
}

/// R6: zero, negative and non-finite jitter refresh exactly on time; a huge value acts at most like 1.0.
#[tokio::test(start_paused = true)]
async fn zero_and_invalid_jitter_are_harmless() {
    for jitter in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE] {
        let times = refresh_times(&RefreshPolicy::new().with_jitter(jitter), 20).await;
        assert!(times.iter().all(|after| *after == 54_000 * MILLI), "{jitter}: {times:?}");
    }
    let times = refresh_times(&RefreshPolicy::new().with_jitter(1e300), 20).await;
    assert!(times.iter().all(|after| (48_000 * MILLI..=54_000 * MILLI).contains(after)), "{times:?}");
}

/// R6: jitter only ever moves a refresh earlier.
#[tokio::test(start_paused = true)]
async fn jitter_only_makes_refreshes_earlier() {
    for _ in 0..50 {
        let mint = Mint::default();
        let jwts = Refreshing::with_policy(mint.clone(), RefreshPolicy::new().with_jitter(1.0));
        jwts.prefetch().await.unwrap();
        // The advisory window is 6 s, so with full jitter the refresh begins between 48 s and 54 s.
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

/// Rejecting the current token refreshes it; rejecting an older one does nothing.
#[tokio::test(start_paused = true)]
async fn only_the_current_token_can_be_rejected() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    let first = jwts.token().await.unwrap();
    jwts.rejected(&first);
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    jwts.rejected(&first);
    assert_eq!((text(&jwts).await.unwrap(), mint.asked()), ("token-2".into(), 2));
    assert_eq!(mint.reasons(), ["first", "rejected token-1"]);
}

/// `token_valid_for` fetches a token that is valid for long enough, and fails if no token lives that long.
#[tokio::test(start_paused = true)]
async fn longer_validity_is_fetched_or_fails() {
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

/// A rejected key stays in use as long as its source has no other.
#[tokio::test(start_paused = true)]
async fn rejected_key_stays_without_a_replacement() {
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        Ok::<_, BoxError>(ApiKey::new("sk-selam-the-only-one")?)
    }));
    let key = keys.api_key().await.unwrap();
    keys.rejected(&key);
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-the-only-one");
}
