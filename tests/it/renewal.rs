//! R1 to R6, F1 to F7 and W1 to W3: the engine, seen by those who want a token. Time is paused.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, UNIX_EPOCH},
};

use tokio::time::{advance, sleep};
use tower_selam::{
    ApiKey, AuthError, AuthErrorKind, BoxError, RenewalPolicy, Renewing, TestClock, Token,
    source::{Fetched, Reason, Source, SourceError, source_fn},
};

const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

/// A source that counts how often it is asked, and answers from a script: a token that lives a minute when
/// that is at its end.
#[derive(Clone, Default)]
struct Mint {
    asked: Arc<AtomicUsize>,
    takes: Arc<Mutex<Duration>>,
    script: Arc<Mutex<VecDeque<Answer>>>,
    reasons: Arc<Mutex<Vec<String>>>,
    version: Arc<AtomicUsize>,
}

#[derive(Clone)]
enum Answer {
    Lives(Duration),
    Same(&'static str, Duration),
    Fails(Option<Duration>),
    Refused,
    Panics,
    Hangs,
}

impl Mint {
    fn then(self, answer: Answer) -> Self {
        self.script.lock().unwrap().push_back(answer);
        self
    }

    fn taking(self, time: Duration) -> Self {
        *self.takes.lock().unwrap() = time;
        self
    }

    fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }
}

impl Source<Token> for Mint {
    async fn fetch(&self, reason: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        let number = self.asked.fetch_add(1, SeqCst) + 1;
        self.reasons.lock().unwrap().push(match reason {
            Reason::First => "first".to_owned(),
            Reason::Expiring(token) => format!("expiring {}", token.expose_secret()),
            Reason::Rejected(token) => format!("rejected {}", token.expose_secret()),
            _ => "other".to_owned(),
        });
        let takes = *self.takes.lock().unwrap();
        sleep(takes).await;
        let answer = self.script.lock().unwrap().pop_front().unwrap_or(Answer::Lives(MINUTE));
        let token = |text: String, lives| Ok(Fetched::new(Token::new(text)?).with_lifetime(lives));
        match answer {
            Answer::Lives(lives) => token(format!("token-{number}"), lives),
            Answer::Same(text, lives) => token(text.to_owned(), lives),
            Answer::Fails(None) => Err(SourceError::transient("out of order")),
            Answer::Fails(Some(wait)) => Err(SourceError::transient("busy").with_retry_after(wait)),
            Answer::Refused => Err(SourceError::permanent("the login has ended")),
            Answer::Panics => panic!("sk-selam-a-secret-in-a-panic"),
            Answer::Hangs => std::future::pending().await,
        }
    }

    fn version(&self) -> u64 {
        self.version.load(SeqCst) as u64
    }
}

/// No jitter, and a wall clock that goes with tokio's.
fn engine(mint: &Mint) -> (Renewing<Token>, TestClock) {
    let clock = TestClock::new(UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let policy = RenewalPolicy::new().with_jitter(0.0).with_clock(clock.clone());
    (Renewing::with_policy(mint.clone(), policy), clock)
}

async fn text(jwts: &Renewing<Token>) -> Result<String, AuthErrorKind> {
    jwts.token().await.map(|token| token.expose_secret().to_owned()).map_err(|error| error.kind())
}

/// Lets the tasks that are ready run.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

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
    assert_eq!(*mint.reasons.lock().unwrap(), ["first", "expiring token-1"]);
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
        let mut mint = Mint::default().then(Answer::Lives(MINUTE));
        for _ in 0..1_000 {
            mint = mint.then(answer.clone());
        }
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

#[tokio::test(start_paused = true)]
async fn w1_while_the_old_token_is_valid_no_request_fails_and_back_off_grows() {
    let mut mint = Mint::default().then(Answer::Lives(60 * MINUTE));
    for _ in 0..1_000 {
        mint = mint.then(Answer::Fails(None));
    }
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

#[tokio::test(start_paused = true)]
async fn an_invalidated_token_is_replaced_and_only_if_it_is_still_the_present_one() {
    let mint = Mint::default();
    let (jwts, _) = engine(&mint);
    let first = jwts.token().await.unwrap();
    jwts.invalidate(&first);
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    jwts.invalidate(&first);
    assert_eq!((text(&jwts).await.unwrap(), mint.asked()), ("token-2".into(), 2));
    assert_eq!(*mint.reasons.lock().unwrap(), ["first", "rejected token-1"]);
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
