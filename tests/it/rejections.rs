//! J10: an endpoint that rejects what all others accept, for an hour of virtual time, and sources that rightly return the same
//! credential all the time.

use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::time::{Instant, advance, sleep};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_selam::{
    ApiKey, ApiKeyLayer, BoxError, JwtLayer, RefreshLayer, RefreshPolicy, Refreshing, Token,
    auth_error::InspectedBody,
    oauth::{OAuthSource, TokenEndpoint, TokenType},
    source::{Fetched, FileSource, Reason, source_fn},
};

use crate::{
    api::{INVALID_KEY, INVALID_TOKEN},
    files::Directory,
    mint::{Answer, MINUTE, Mint, SECOND, clock, engine, settle, text},
    support::{Body, key, response},
};

const REJECTING: &str = "https://api.selamgpt.com/v1/rejecting";
const OTHER: &str = "https://api.selamgpt.com/v1/models";

type Stack = BoxCloneSyncService<Request<Body>, Response<InspectedBody<Body>>, BoxError>;

/// An API of which one endpoint answers 401 to everybody, and the number of its requests.
fn api(
    error_body: &'static str,
) -> (
    impl Service<Request<Body>, Response = Response<Body>, Error = BoxError, Future: Send> + Clone,
    Arc<AtomicUsize>,
) {
    let sends = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&sends);
    let api = service_fn(move |request: Request<Body>| {
        counter.fetch_add(1, SeqCst);
        let is_rejected = request.uri() == REJECTING;
        std::future::ready(Ok(if is_rejected { response(401, error_body) } else { response(200, "") }))
    });
    (api, sends)
}

fn stack_of_key(keys: &Refreshing<ApiKey>) -> (Stack, Arc<AtomicUsize>) {
    let (api, sends) = api(INVALID_KEY);
    (Stack::new(RefreshLayer::new().layer(ApiKeyLayer::bearer(keys).layer(api))), sends)
}

fn stack_of_jwt(jwts: &Refreshing<Token>) -> (Stack, Arc<AtomicUsize>) {
    let (api, sends) = api(INVALID_TOKEN);
    let layers = (JwtLayer::new(jwts), ApiKeyLayer::x_api_key(key()));
    (Stack::new(RefreshLayer::new().layer(layers.layer(api))), sends)
}

async fn ask(stack: &Stack, uri: &str) -> StatusCode {
    let request = Request::post(uri).body(Full::from("the body")).unwrap();
    stack.clone().oneshot(request).await.unwrap().status()
}

/// How many times requests are sent in an hour: every five seconds.
const ROUNDS: usize = 720;

/// Sends a request to the rejecting endpoint and to another one in each round. Returns how many of the others waited.
async fn an_hour_of_rejections(stack: &Stack) -> usize {
    let mut waits = 0;
    for _ in 0..ROUNDS {
        let other = async {
            let started = Instant::now();
            (ask(stack, OTHER).await, started.elapsed())
        };
        let (rejected, (accepted, wait)) = tokio::join!(ask(stack, REJECTING), other);
        assert_eq!((rejected, accepted), (StatusCode::UNAUTHORIZED, StatusCode::OK));
        waits += usize::from(!wait.is_zero());
        sleep(5 * SECOND).await;
    }
    waits
}

/// A token endpoint that caches: it returns the same token until it expires, after half an hour. Returns its requests' number.
fn caching_endpoint() -> (TokenEndpoint, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let (counter, issued) = (Arc::clone(&calls), Arc::new(Mutex::new(None::<(Instant, usize)>)));
    let endpoint = service_fn(move |_: Request<Body>| {
        counter.fetch_add(1, SeqCst);
        let issued = Arc::clone(&issued);
        async move {
            sleep(SECOND / 10).await;
            let mut issued = issued.lock().unwrap();
            let (at, number) = issued
                .filter(|(at, _)| at.elapsed() < 27 * MINUTE)
                .unwrap_or_else(|| (Instant::now(), issued.map_or(1, |(_, number)| number + 1)));
            *issued = Some((at, number));
            let left = (30 * MINUTE).saturating_sub(at.elapsed()).as_secs();
            let body =
                format!(r#"{{"access_token":"jwt-{number}","token_type":"Bearer","expires_in":{left}}}"#);
            Ok::<_, BoxError>(response(200, body))
        }
    });
    (TokenEndpoint::new("https://login.example/token", endpoint).unwrap(), calls)
}

/// J10: keys and JWTs in files.
#[tokio::test(start_paused = true)]
async fn files_stay_in_use() {
    let directory = Directory::new();
    fs::write(directory.file(), "from-a-file").unwrap();
    let policy = RefreshPolicy::new().with_clock(clock());
    let keys = Refreshing::with_policy(FileSource::<ApiKey>::new(directory.file()), policy.clone());
    let jwts = Refreshing::with_policy(FileSource::<Token>::new(directory.file()), policy);
    for (stack, sends) in [stack_of_key(&keys), stack_of_jwt(&jwts)] {
        an_hour_of_rejections(&stack).await;
        assert_eq!(sends.load(SeqCst), 2 * ROUNDS, "nothing is replayed");
    }
}

/// J10: a token endpoint that caches.
#[tokio::test(start_paused = true)]
async fn cached_tokens_stay_in_use() {
    let (endpoint, calls) = caching_endpoint();
    let policy = RefreshPolicy::new().with_clock(clock());
    let jwts = Refreshing::with_policy(OAuthSource::client_credentials(endpoint), policy);
    let (stack, sends) = stack_of_jwt(&jwts);
    let waits = an_hour_of_rejections(&stack).await;
    // The first token, and the first rejection.
    assert!(waits <= 2, "{waits} requests waited");
    let calls = calls.load(SeqCst);
    assert!((50..=80).contains(&calls), "{calls} requests of the token endpoint in an hour");
    let replays = sends.load(SeqCst) - 2 * ROUNDS;
    assert!(replays <= 3, "{replays} replays");
}

/// J10: a source that has another token each time.
#[tokio::test(start_paused = true)]
async fn new_tokens_are_fetched_in_the_background() {
    let mint = (0..1_000).fold(Mint::default(), |mint, _| mint.then(Answer::Lives(60 * MINUTE)));
    mint.takes(SECOND / 10);
    let (jwts, _) = engine(&mint);
    let (stack, sends) = stack_of_jwt(&jwts);
    let waits = an_hour_of_rejections(&stack).await;
    assert!(waits <= 2, "{waits} requests waited");
    assert!((50..=80).contains(&mint.asked()), "{} fetches in an hour", mint.asked());
    assert!(sends.load(SeqCst) - 2 * ROUNDS < mint.asked(), "a request is replayed with another token only");
}

/// J10: the source fails whenever the API has rejected its token, in each way.
#[tokio::test(start_paused = true)]
async fn failing_source_hurts_nobody() {
    for answer in
        [Answer::Fails(None), Answer::Fails(Some(SECOND)), Answer::Refused, Answer::Panics, Answer::Hangs]
    {
        let mint = Mint::default().then(Answer::Lives(120 * MINUTE)).then_always(answer);
        let (jwts, _) = engine(&mint);
        let (stack, _) = stack_of_jwt(&jwts);
        let waits = an_hour_of_rejections(&stack).await;
        assert!(waits <= 1, "{waits} requests waited");
        assert!(mint.asked() < ROUNDS + 20 && mint.asked() > 10, "{}", mint.asked());
    }
}

/// J10: the token of an exchange, its subject token and its API key, and an endpoint that fails once.
#[tokio::test(start_paused = true)]
async fn exchanged_tokens_stay_in_use() {
    for refusal in ["invalid_request", "invalid_grant", "invalid_token", "invalid_client", "invalid_target"] {
        let directory = Directory::new();
        fs::write(directory.file(), "the-subject-token").unwrap();
        let policy = RefreshPolicy::new().with_clock(clock());
        let subjects = Refreshing::with_policy(FileSource::<Token>::new(directory.file()), policy.clone());
        let fails = Arc::new(AtomicBool::new(false));
        let (is_failing, calls) = (Arc::clone(&fails), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&calls);
        let endpoint = service_fn(move |_: Request<Body>| {
            let call = counter.fetch_add(1, SeqCst);
            let answer = if is_failing.load(SeqCst) {
                response(400, format!(r#"{{"error":"{refusal}"}}"#))
            } else {
                let lifetime = 300 + call % 2;
                response(
                    200,
                    format!(
                        r#"{{"access_token":"exchanged","token_type":"Bearer","expires_in":{lifetime}}}"#
                    ),
                )
            };
            std::future::ready(Ok::<_, BoxError>(answer))
        });
        let endpoint = TokenEndpoint::new("https://login.example/token", endpoint).unwrap();
        let exchange = OAuthSource::token_exchange(endpoint, &subjects, TokenType::AccessToken);
        let jwts = Refreshing::with_policy(exchange, policy);
        let (stack, _) = stack_of_jwt(&jwts);
        for minute in 0..12 {
            // Every token endpoint fails at times.
            fails.store(minute % 7 == 3, SeqCst);
            for _ in 0..20 {
                assert_eq!(ask(&stack, REJECTING).await, StatusCode::UNAUTHORIZED);
                assert_eq!(ask(&stack, OTHER).await, StatusCode::OK, "{refusal}, minute {minute}");
                sleep(3 * SECOND).await;
            }
        }
        assert_eq!(subjects.current().unwrap().expose_secret(), "the-subject-token");
        assert!(calls.load(SeqCst) < 32, "{refusal}: {} requests of the token endpoint", calls.load(SeqCst));
    }
}

/// J10: only an answer about the subject token blames it; an assertion is not blamed by `invalid_request`.
#[tokio::test(start_paused = true)]
async fn only_an_answer_about_the_token_blames_it() {
    for (code, status, by_exchange, by_assertion) in [
        ("invalid_grant", 400, true, true),
        ("invalid_token", 400, true, true),
        ("invalid_token", 401, true, true),
        ("invalid_request", 400, true, false),
        ("invalid_target", 400, false, false),
        ("invalid_client", 401, false, false),
        ("unauthorized_client", 400, false, false),
        ("invalid_scope", 400, false, false),
        ("server_error", 500, false, false),
        ("invalid_grant", 500, false, false),
    ] {
        for (is_exchange, is_blamed) in [(true, by_exchange), (false, by_assertion)] {
            let endpoint = service_fn(move |_: Request<Body>| {
                std::future::ready(Ok::<_, BoxError>(response(status, format!(r#"{{"error":"{code}"}}"#))))
            });
            let endpoint = TokenEndpoint::new("https://login.example/token", endpoint).unwrap();
            let reads = Arc::new(AtomicUsize::new(0));
            let counter = Arc::clone(&reads);
            let subjects = Refreshing::new(source_fn(move |_: Reason<Token>| {
                counter.fetch_add(1, SeqCst);
                async { Ok::<_, BoxError>(Token::new("subject")?) }
            }));
            let source = if is_exchange {
                OAuthSource::token_exchange(endpoint, &subjects, TokenType::Jwt)
            } else {
                OAuthSource::jwt_bearer(endpoint, &subjects)
            };
            Refreshing::new(source).token().await.unwrap_err();
            let case = format!("{status} {code}, exchange: {is_exchange}");
            assert_eq!(reads.load(SeqCst), 1 + usize::from(is_blamed), "{case}");
            assert_eq!(text(&subjects).await.unwrap(), "subject", "{case}");
        }
    }
}

/// J5, J10: one of two servers behind the API rejects everything, and the other accepts every replay.
#[tokio::test(start_paused = true)]
async fn accepted_replays_do_not_lift_the_limit() {
    let mint = (0..1_000).fold(Mint::default(), |mint, _| mint.then(Answer::Lives(120 * MINUTE)));
    let (jwts, _) = engine(&mint);
    let turns = Arc::new(AtomicUsize::new(0));
    let flaky = service_fn(move |_: Request<Body>| {
        let is_rejected = turns.fetch_add(1, SeqCst).is_multiple_of(2);
        std::future::ready(Ok::<_, BoxError>(if is_rejected {
            response(401, INVALID_TOKEN)
        } else {
            response(200, "")
        }))
    });
    let service =
        RefreshLayer::new().layer((JwtLayer::new(&jwts), ApiKeyLayer::x_api_key(key())).layer(flaky));
    for _ in 0..1_800 {
        let request = Request::post(OTHER).body(Full::from("the body")).unwrap();
        service.clone().oneshot(request).await.unwrap();
        sleep(2 * SECOND).await;
    }
    // An hour: 64 at once, then one a minute.
    assert!((60..=150).contains(&mint.asked()), "{}", mint.asked());
}

/// J5: without the layers, `rejected` is spaced as with them.
#[tokio::test(start_paused = true)]
async fn reports_without_the_layers_are_spaced() {
    // The source repeats the token, brings another, or fails.
    for (answers, current) in [
        (Answer::Same("token-1", 120 * MINUTE), "token-1"),
        (Answer::Lives(120 * MINUTE), "token-2"),
        (Answer::Fails(Some(60 * MINUTE)), "token-1"),
    ] {
        let mint = Mint::default().then(Answer::Lives(120 * MINUTE)).then_always(answers);
        let (jwts, _) = engine(&mint);
        jwts.prefetch().await.unwrap();
        for _ in 0..50 {
            jwts.rejected(&jwts.current().unwrap());
            settle().await;
        }
        assert_eq!((mint.asked(), text(&jwts).await.unwrap().as_str()), (2, current));
        // A credential that was never in use.
        jwts.rejected(&Token::new("another").unwrap());
        settle().await;
        assert_eq!(mint.asked(), 2);
    }
}

/// J5: `accepted` ends the spacing for a replacement, not for the credential that was rejected.
#[tokio::test(start_paused = true)]
async fn accepted_replacement_ends_the_spacing() {
    let mint = (0..200).fold(Mint::default(), |mint, _| mint.then(Answer::Lives(60 * MINUTE)));
    let (jwts, _) = engine(&mint);
    let first = jwts.token().await.unwrap();
    let reject = async || {
        jwts.rejected(&jwts.current().unwrap());
        settle().await;
        mint.asked()
    };
    assert_eq!((reject().await, reject().await), (2, 2));
    jwts.accepted(&first);
    assert_eq!(reject().await, 2, "`first` is not the current token");
    jwts.accepted(&jwts.current().unwrap());
    assert_eq!((reject().await, reject().await), (3, 3));

    let mint = Mint::default().then_always(Answer::Same("token-same", 60 * MINUTE));
    let (jwts, _) = engine(&mint);
    let token = jwts.token().await.unwrap();
    for _ in 0..10 {
        jwts.rejected(&token);
        jwts.accepted(&token);
        settle().await;
    }
    assert_eq!(mint.asked(), 2);
}

/// J3, J10: a refresh begun before the rejection does not vouch for the token; one begun after does.
#[tokio::test(start_paused = true)]
async fn earlier_refresh_does_not_vouch() {
    let mint = Mint::default().then(Answer::Lives(MINUTE)).then_always(Answer::Same("token-1", 60 * MINUTE));
    let (jwts, _) = engine(&mint);
    let token = jwts.token().await.unwrap();
    advance(54 * SECOND).await;
    mint.takes(SECOND);
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    settle().await;
    jwts.rejected(&token);
    let started = Instant::now();
    assert_eq!(text(&jwts).await.unwrap(), "token-1");
    assert_eq!((started.elapsed().as_secs(), mint.asked()), (2, 3), "the refresh is repeated");
    assert_eq!(mint.reasons(), ["first", "expiring token-1", "rejected token-1"]);
    // From now on nobody waits.
    for _ in 0..600 {
        jwts.rejected(&token);
        let started = Instant::now();
        assert_eq!(text(&jwts).await.unwrap(), "token-1");
        assert_eq!(started.elapsed(), Duration::ZERO);
        sleep(SECOND).await;
    }
    assert!((10..=20).contains(&mint.asked()), "{}", mint.asked());
}

/// J10: what replaces a suspect token may expire sooner.
#[tokio::test(start_paused = true)]
async fn suspect_token_is_replaced_by_a_shorter_one() {
    let mint = Mint::default().then(Answer::Lives(60 * MINUTE)).then(Answer::Lives(MINUTE));
    let (jwts, _) = engine(&mint);
    let token = jwts.token().await.unwrap();
    jwts.rejected(&token);
    assert_eq!(text(&jwts).await.unwrap(), "token-2");
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        Ok::<_, BoxError>(Fetched::new(ApiKey::new("sk-selam-the-only-one")?))
    }));
    keys.rejected(&keys.api_key().await.unwrap());
    assert_eq!(keys.api_key().await.unwrap().expose_secret(), "sk-selam-the-only-one");
}
