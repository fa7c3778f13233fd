//! Tests of odd token lifetimes and of clocks that jump, in paused time.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{Request, Response, StatusCode};
use tokio::time::{Instant, advance, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthErrorKind, BoxError, JwtLayer, RefreshLayer, RefreshPolicy, Refreshing,
    TestClock, Token,
    source::{Fetched, Reason, source_fn},
};

use crate::{
    api::request,
    mint::{Answer, MINUTE, Mint, SECOND, clock, engine, text},
    support::{Body, jwt_claiming, key, response},
};

/// R4: an odd `exp` or `iat` gives a bounded lifetime or a typed error, never a token that does not expire.
#[tokio::test(start_paused = true)]
async fn every_jwt_expires_or_is_rejected() {
    // The test clock starts at 1900000000. A lifetime of `None` means an error. `states` tells whether the JWT has
    // a usable expiry; without one, `require_expiry` makes it an error.
    let minutes = |count: u32| Some(count * MINUTE);
    for (claims, lifetime, states) in [
        (r#"{"exp":1900000060}"#, minutes(1), true),
        (r#"{"exp":1900000060.0}"#, minutes(1), true),
        (r#"{"exp":1.90000006e9}"#, minutes(1), true),
        (r#"{"exp":1900000000.75}"#, Some(3 * SECOND / 4), true),
        (r#"{"exp":1900000000}"#, None, true),
        (r#"{"exp":1899999999}"#, None, true),
        (r#"{"exp":0}"#, None, true),
        (r#"{"exp":-0.0}"#, None, true),
        (r#"{"exp":253402300799}"#, minutes(365 * 24 * 60), true),
        (r#"{"exp":9223372036854775807}"#, minutes(5), false),
        (r#"{"exp":9223372036854775808}"#, minutes(5), false),
        (r#"{"exp":18446744073709551616}"#, minutes(5), false),
        (r#"{"exp":1e400}"#, minutes(5), false),
        (r#"{"exp":-1}"#, minutes(5), false),
        (r#"{"exp":"1900000060"}"#, minutes(5), false),
        (r#"{"exp":null}"#, minutes(5), false),
        (r#"{"exp":[1900000060]}"#, minutes(5), false),
        (r#"{"exp":true}"#, minutes(5), false),
        (r#"{"exp":NaN}"#, minutes(5), false),
        (r"{}", minutes(5), false),
        ("", minutes(5), false),
        // `iat` can only shorten the lifetime.
        (r#"{"iat":1899999990,"exp":1900000060}"#, minutes(1), true),
        (r#"{"iat":1900000030,"exp":1900000060}"#, Some(30 * SECOND), true),
        (r#"{"iat":1900000060,"exp":1900000060}"#, None, true),
        (r#"{"iat":1900000070,"exp":1900000060}"#, minutes(1), true),
        (r#"{"iat":"1900000000","exp":1900000060}"#, minutes(1), true),
        (r#"{"iat":-9223372036854775808,"exp":1900000060}"#, minutes(1), true),
        (r#"{"iat":1e400,"exp":1900000060}"#, minutes(1), true),
        (r#"{"iat":1900000000}"#, minutes(5), false),
    ] {
        for strict in [false, true] {
            let expected = lifetime.filter(|_| states || !strict);
            let clock = clock();
            let policy = RefreshPolicy::new().with_clock(clock.clone());
            let policy = if strict { policy.require_expiry() } else { policy };
            // The source has a single token.
            let mint = Mint::default().then(Answer::Bare(jwt_claiming(claims))).then_always(Answer::Refused);
            let jwts = Refreshing::with_policy(mint.clone(), policy);
            let fetched = jwts.token().await;
            let Some(expected) = expected else {
                let error = fetched.unwrap_err();
                assert_eq!(error.kind(), AuthErrorKind::RefreshFailed, "{claims}");
                let why = if states { "returned an expired credential" } else { "a token without an expiry" };
                assert!(error.to_string().contains(why), "{claims}: {error}");
                assert_eq!((jwts.expires_at(), mint.asked()), (None, 1), "{claims}");
                continue;
            };
            fetched.unwrap();
            assert_eq!(jwts.expires_at(), Some(clock.now() + expected), "{claims}");
            advance(expected - Duration::from_millis(1)).await;
            assert!(jwts.current().is_some(), "{claims}");
            advance(Duration::from_millis(1)).await;
            assert!(jwts.current().is_none(), "the token must expire: {claims}");
            assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshRejected), "{claims}");
        }
    }
}

/// R4: a lifetime that the source states overrides `exp`, and is capped at a year.
#[tokio::test(start_paused = true)]
async fn stated_lifetime_is_capped() {
    let year = 365 * 24 * 60 * MINUTE;
    for (stated, lifetime) in [
        (Duration::ZERO, None),
        (Duration::from_nanos(1), None),
        (2 * MINUTE, Some(2 * MINUTE)),
        (10 * year, Some(year)),
        (Duration::MAX, Some(year)),
    ] {
        let clock = clock();
        // By its `exp` the token expired an hour ago, as if this machine's clock were ahead.
        let jwt = jwt_claiming(r#"{"exp":1899996400}"#);
        let source = source_fn(move |_: Reason<Token>| {
            let fetched = Fetched::new(jwt.clone()).with_lifetime(stated);
            async move { Ok::<_, BoxError>(fetched) }
        });
        let jwts = Refreshing::with_policy(source, RefreshPolicy::new().with_clock(clock.clone()));
        let fetched = jwts.token().await.map(|_| ()).map_err(|error| error.kind());
        assert_eq!(fetched, lifetime.map(|_| ()).ok_or(AuthErrorKind::RefreshFailed), "{stated:?}");
        assert_eq!(jwts.expires_at(), lifetime.map(|lifetime| clock.now() + lifetime), "{stated:?}");
    }
    // A key never expires unless its source states a lifetime.
    for (stated, never_expires) in [(None, true), (Some(MINUTE), false), (Some(Duration::MAX), false)] {
        let source = source_fn(move |_: Reason<ApiKey>| async move {
            let fetched = Fetched::new(ApiKey::new("sk-selam-x")?);
            Ok::<_, BoxError>(if let Some(stated) = stated { fetched.with_lifetime(stated) } else { fetched })
        });
        let keys = Refreshing::new(source);
        keys.prefetch().await.unwrap();
        assert_eq!(keys.expires_at().is_none(), never_expires, "{stated:?}");
    }
}

/// R4: an assumed lifetime is capped at a year.
#[tokio::test(start_paused = true)]
async fn assumed_lifetime_is_capped() {
    let year = 365 * 24 * 60 * MINUTE;
    for (assumed, lifetime) in [(Duration::ZERO, None), (MINUTE, Some(MINUTE)), (Duration::MAX, Some(year))] {
        let clock = clock();
        let policy = RefreshPolicy::new().with_clock(clock.clone()).with_assumed_lifetime(assumed);
        let mint = Mint::default().then(Answer::Bare(Token::new("opaque").unwrap()));
        let jwts = Refreshing::with_policy(mint, policy);
        let fetched = jwts.token().await.map(|_| ()).map_err(|error| error.kind());
        assert_eq!(fetched, lifetime.map(|_| ()).ok_or(AuthErrorKind::RefreshFailed), "{assumed:?}");
        assert_eq!(jwts.expires_at(), lifetime.map(|lifetime| clock.now() + lifetime), "{assumed:?}");
    }
}

/// R5: wall-clock jumps and a suspended machine cost one refresh each, and no expired token is returned.
#[tokio::test(start_paused = true)]
async fn clock_jumps_cause_no_refresh_storm() {
    let mint = Mint::default();
    let (jwts, clock) = engine(&mint);
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    clock.jump_back(60 * MINUTE);
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    advance(MINUTE + SECOND).await;
    assert_eq!(
        text(&jwts).await.unwrap(),
        "token-2",
        "the monotonic clock decides, although the wall clock was set back"
    );
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

/// A machine whose clocks may be wrong, next to an API that knows the true time.
#[derive(Clone)]
struct Machine {
    clock: TestClock,
    started: Instant,
    suspended: Arc<Mutex<Duration>>,
    /// When each token was issued.
    issued: Arc<Mutex<Vec<Duration>>>,
    /// The number of each token sent, and whether it had expired.
    sent: Arc<Mutex<Vec<(usize, bool)>>>,
}

impl Machine {
    fn new() -> Self {
        let (suspended, issued, sent) = (Arc::default(), Arc::default(), Arc::default());
        Self { clock: clock(), started: Instant::now(), suspended, issued, sent }
    }

    /// Returns the true time elapsed, independent of the machine's clocks.
    fn true_time(&self) -> Duration {
        self.started.elapsed() + *self.suspended.lock().unwrap()
    }

    fn suspend(&self, time: Duration) {
        *self.suspended.lock().unwrap() += time;
        self.clock.jump(time);
    }

    /// Returns an engine whose tokens live one minute from the start of a fetch that takes `fetch_time`.
    fn engine(&self, fetch_time: Duration) -> Refreshing<Token> {
        let machine = self.clone();
        let source = source_fn(move |_: Reason<Token>| {
            let mut issued = machine.issued.lock().unwrap();
            issued.push(machine.true_time());
            let token = Token::new(format!("token-{}", issued.len()));
            async move {
                sleep(fetch_time).await;
                Ok::<_, BoxError>(Fetched::new(token?).with_lifetime(MINUTE))
            }
        });
        let policy = RefreshPolicy::new().with_jitter(0.0).with_clock(self.clock.clone());
        Refreshing::with_policy(source, policy)
    }

    fn api(
        &self,
    ) -> impl Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + use<>
    {
        let machine = self.clone();
        service_fn(move |request: Request<Body>| {
            let bearer = request.headers()["authorization"].to_str().unwrap();
            let number: usize = bearer.strip_prefix("Bearer token-").unwrap().parse().unwrap();
            let expired = machine.true_time() >= machine.issued.lock().unwrap()[number - 1] + MINUTE;
            machine.sent.lock().unwrap().push((number, expired));
            std::future::ready(Ok(response(if expired { 401 } else { 200 }, "")))
        })
    }
}

/// R5: whenever a clock jumps or the machine is suspended, no expired token is sent and refreshes stay few.
#[tokio::test(start_paused = true)]
async fn clock_jumps_send_no_expired_token() {
    const HOUR: Duration = Duration::from_secs(60 * 60);
    type Event = (&'static str, fn(&Machine));
    let events: [Event; 5] = [
        ("suspended for eight hours", |machine| machine.suspend(8 * HOUR)),
        ("suspended for half a minute", |machine| machine.suspend(MINUTE / 2)),
        ("set back an hour", |machine| machine.clock.jump_back(HOUR)),
        ("set forward an hour", |machine| machine.clock.jump(HOUR)),
        ("set back an hour, then suspended for one", |machine| {
            machine.clock.jump_back(HOUR);
            machine.suspend(HOUR + MINUTE);
        }),
    ];
    // During the first fetch, while the token is fresh, during the background refresh, and after it.
    for (fetch_millis, at) in
        [(200, 100), (200, 10_000), (200, 54_300), (200, 54_600), (5_800, 3_000), (5_800, 57_000)]
    {
        for (event, trigger) in events {
            let machine = Machine::new();
            let jwts = machine.engine(Duration::from_millis(fetch_millis));
            let stack = RefreshLayer::new()
                .layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(machine.api()));
            let mut calls = Vec::new();
            let send = |calls: &mut Vec<_>| calls.push(tokio::spawn(stack.clone().oneshot(request())));
            let began = Instant::now();
            let mut triggered = false;
            while began.elapsed() < 2 * MINUTE {
                send(&mut calls);
                sleep(Duration::from_millis(100)).await;
                if !triggered && began.elapsed() >= Duration::from_millis(at) {
                    triggered = true;
                    trigger(&machine);
                    (0..100).for_each(|_| send(&mut calls));
                }
            }
            let case = format!("{event} at {at} ms, fetches taking {fetch_millis} ms");
            for call in calls {
                let response = call.await.unwrap();
                assert_eq!(response.expect(&case).status(), StatusCode::OK, "{case}");
            }
            let sent = machine.sent.lock().unwrap();
            assert_eq!(sent.iter().filter(|(_, expired)| *expired).count(), 0, "{case}");
            let refreshes = machine.issued.lock().unwrap().len();
            assert!((2..=6).contains(&refreshes), "{case}: {refreshes} refreshes in two minutes");
        }
    }
}

/// R5: a JWT with `iat` and `exp` expires on time although the machine's clock is wrong.
#[tokio::test(start_paused = true)]
async fn jwt_expires_on_time_with_a_wrong_clock() {
    // The issuer's clock shows 1900000000; the machine's is ten hours behind, then ten hours ahead.
    const OFFSET: Duration = Duration::from_secs(10 * 60 * 60);
    let jwt = jwt_claiming(r#"{"iat":1900000000,"exp":1900000060}"#);
    let mint = Mint::default().then(Answer::Bare(jwt.clone()));
    let (jwts, clock) = engine(&mint);
    clock.jump_back(OFFSET);
    assert_eq!(text(&jwts).await.unwrap(), jwt.expose_secret());
    advance(53 * SECOND).await;
    assert_eq!((text(&jwts).await.unwrap().as_str(), mint.asked()), (jwt.expose_secret(), 1));
    advance(7 * SECOND).await;
    assert_eq!((jwts.current().map(|_| ()), text(&jwts).await.unwrap()), (None, "token-2".into()));

    let mint = Mint::default().then_always(Answer::Bare(jwt));
    let (jwts, clock) = engine(&mint);
    clock.jump(OFFSET);
    let error = jwts.token().await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::RefreshFailed);
    assert!(error.to_string().contains("this machine's clock is ahead"), "{error}");
    for _ in 0..100 {
        assert_eq!(text(&jwts).await, Err(AuthErrorKind::RefreshFailed));
    }
    assert_eq!(mint.asked(), 1, "repeated calls must not refetch");
}

/// R5: a JWT whose fetch spans a suspension is fetched again.
#[tokio::test(start_paused = true)]
async fn jwt_fetched_before_suspension_is_refetched() {
    // The wall clock is wrong as well, so `exp` alone does not reveal the suspension.
    let mint = Mint::default()
        .taking(SECOND)
        .then(Answer::Bare(jwt_claiming(r#"{"iat":1900000000,"exp":1900000060}"#)));
    let (jwts, clock) = engine(&mint);
    clock.jump_back(600 * MINUTE);
    let call = tokio::spawn({
        let jwts = jwts.clone();
        async move { text(&jwts).await }
    });
    advance(SECOND / 2).await;
    clock.jump(480 * MINUTE);
    assert_eq!(call.await.unwrap().unwrap(), "token-2");
    assert_eq!((mint.asked(), mint.reasons()), (2, vec!["first".to_owned(); 2]));
}
