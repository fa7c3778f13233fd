//! A JWT for each subject: H4, H5, O1, F1, J2 and R1 per subject, which subjects are kept in memory, and how many are refreshed
//! at once (M2).

use std::{
    collections::HashMap,
    convert::Infallible,
    future::ready,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Waker},
    time::Duration,
};

use http::{Request, Response, StatusCode, header::LOCATION};
use tokio::{
    runtime,
    task::JoinSet,
    time::{Instant, advance, sleep},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, BoxError, JwtLayer, Origins, PerSubject, RefreshPolicy,
    Refreshing, RequestAuth, SelamLayer, Subject, TestClock, Token,
    source::{Fetched, Reason, SourceError, source_fn},
};

use crate::support::{Body, KEY, MODELS, get, handshake, jwt, key, response, send, values};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// How often each subject's token was fetched.
type Fetches = Arc<Mutex<HashMap<String, usize>>>;

/// Issues `jwt-of-NAME-1`, then `-2`, …; each fetch takes this long and each token lives an hour.
fn mint(fetch_time: Duration) -> (PerSubject, Fetches) {
    let fetches = Fetches::default();
    let tokens = PerSubject::new({
        let fetches = Arc::clone(&fetches);
        move |subject: &Subject| {
            let (fetches, name) = (Arc::clone(&fetches), subject.as_str().to_owned());
            source_fn(move |_: Reason<Token>| {
                let number = {
                    let mut fetches = fetches.lock().unwrap();
                    let count = fetches.entry(name.clone()).or_default();
                    *count += 1;
                    *count
                };
                let text = format!("jwt-of-{name}-{number}");
                async move {
                    // Even the shortest sleep takes a millisecond.
                    if !fetch_time.is_zero() {
                        sleep(fetch_time).await;
                    }
                    Ok::<_, BoxError>(Fetched::new(Token::new(text)?).with_lifetime(60 * MINUTE))
                }
            })
        }
    });
    (tokens, fetches)
}

fn fetch_count(fetches: &Fetches, name: &str) -> usize {
    fetches.lock().unwrap().get(name).copied().unwrap_or_default()
}

fn request_of(name: &str) -> Request<()> {
    let mut request = get(MODELS);
    request.extensions_mut().insert(Subject::new(name));
    request
}

fn with_auth(mut request: Request<()>, auth: RequestAuth) -> Request<()> {
    request.extensions_mut().insert(auth);
    request
}

fn auth_headers(request: &Request<()>) -> (Vec<String>, Vec<String>) {
    (values(request, "authorization"), values(request, "x-api-key"))
}

fn jwt_and_key(jwt: &str) -> (Vec<String>, Vec<String>) {
    (vec![format!("Bearer {jwt}")], vec![KEY.to_owned()])
}

/// Lets the tasks that are ready run.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

/// H4: each request gets its subject's JWT; a request without a subject is refused.
#[tokio::test(start_paused = true)]
async fn each_request_gets_its_subjects_jwt() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    for name in ["one", "two", "one", "three", "two"] {
        let request = send(&layer, request_of(name)).await.unwrap();
        assert_eq!(auth_headers(&request), jwt_and_key(&format!("jwt-of-{name}-1")));
    }
    assert_eq!((fetch_count(&fetches, "one"), tokens.len()), (1, 3));

    // A request without a subject does not get the JWT of the previous one.
    let refused = send(&layer, get(MODELS)).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::CredentialUnavailable);
    assert!(refused.to_string().contains("has no `Subject`"), "{refused}");
}

/// H4: a subject combines with `ApiKeyAndJwt`, `ApiKey`, `Anonymous` and `VoiceAgent`.
#[tokio::test(start_paused = true)]
async fn subject_combines_with_request_auth() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&tokens).build().unwrap();
    let request = send(&layer, with_auth(request_of("one"), RequestAuth::ApiKeyAndJwt)).await.unwrap();
    assert_eq!(auth_headers(&request), jwt_and_key("jwt-of-one-1"));

    for request in [request_of("nobody"), get(MODELS)] {
        let request = send(&layer, with_auth(request, RequestAuth::ApiKey)).await.unwrap();
        assert_eq!(auth_headers(&request), (vec![format!("Bearer {KEY}")], vec![]));
    }
    let request = send(&layer, with_auth(request_of("nobody"), RequestAuth::Anonymous)).await.unwrap();
    assert_eq!(auth_headers(&request), (vec![], vec![]));
    assert_eq!(
        (fetch_count(&fetches, "nobody"), tokens.len()),
        (0, 1),
        "a token that is not needed is not fetched"
    );

    let mut agent = handshake("wss://api.selamgpt.com/socket.io/?EIO=4&transport=websocket");
    agent.extensions_mut().insert(Subject::new("two"));
    let agent = send(&layer, agent).await.unwrap();
    assert_eq!(
        agent.uri().query(),
        Some(&*format!("EIO=4&transport=websocket&token=jwt-of-two-1&api_key={KEY}"))
    );
}

/// H4: a layer with one JWT for all, or with none, refuses a request that names a subject.
#[tokio::test(start_paused = true)]
async fn layer_without_subjects_refuses_a_subject() {
    let refreshing = Refreshing::new(source_fn(|_: Reason<Token>| ready(Ok::<_, BoxError>(jwt()))));
    refreshing.prefetch().await.unwrap();
    let assert_refused = |result: Result<Request<()>, AuthError>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
        assert!(error.to_string().contains("the same credentials for all"), "{error}");
    };
    for layer in [JwtLayer::new(jwt()), JwtLayer::new(&refreshing)] {
        assert_refused(send(&layer, request_of("one")).await);
    }
    assert_refused(send(&ApiKeyLayer::bearer(key()), request_of("one")).await);
    assert_refused(
        send(&SelamLayer::builder().with_api_key(key()).build().unwrap(), request_of("one")).await,
    );
    // A request for the key alone, or for no credentials, needs no JWT.
    for auth in [RequestAuth::ApiKey, RequestAuth::Anonymous] {
        send(&(JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())), with_auth(request_of("one"), auth))
            .await
            .unwrap();
    }
}

/// H4: a JWT layer and a key layer, in either order, accept a request that names a subject.
#[tokio::test(start_paused = true)]
async fn separate_layers_take_a_subject_in_either_order() {
    let (tokens, _) = mint(Duration::ZERO);
    let (jwt, key) = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    let jwt_outside = ServiceBuilder::new().layer(jwt.clone()).layer(key.clone()).into_inner();
    let key_outside = ServiceBuilder::new().layer(key).layer(jwt).into_inner();
    assert_eq!(
        auth_headers(&send(&jwt_outside, request_of("one")).await.unwrap()),
        jwt_and_key("jwt-of-one-1")
    );
    assert_eq!(
        auth_headers(&send(&key_outside, request_of("one")).await.unwrap()),
        jwt_and_key("jwt-of-one-1")
    );
}

/// H4: a redirected request that lost its subject is refused.
#[tokio::test(start_paused = true)]
async fn redirect_that_loses_the_subject_fails_closed() {
    let (tokens, _) = mint(Duration::ZERO);
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let api = service_fn({
        let seen = Arc::clone(&seen);
        move |request: Request<Body>| {
            seen.lock().unwrap().push(request.uri().to_string());
            let away = Response::builder().status(307).header(LOCATION, "https://other.example/v1");
            ready(Ok::<_, BoxError>(away.body(Body::default()).unwrap()))
        }
    });
    let origins = Origins::selam().with_origin("https://other.example").unwrap();
    let service = ServiceBuilder::new()
        .layer(FollowRedirectLayer::new())
        .layer((
            JwtLayer::new(&tokens).with_origins(origins.clone()),
            ApiKeyLayer::x_api_key(key()).with_origins(origins),
        ))
        .service(api);
    let error = service.oneshot(request_of("one").map(|()| Body::default())).await.unwrap_err();
    let error = AuthError::find(&*error).unwrap();
    assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
    assert_eq!(*seen.lock().unwrap(), [MODELS]);
}

/// O1: a request to a disallowed origin fetches no JWT; in strip mode, credentials are removed from its query.
#[tokio::test(start_paused = true)]
async fn disallowed_origin_fetches_no_jwt() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let elsewhere = |uri| {
        let mut request = get(uri);
        request.extensions_mut().insert(Subject::new("one"));
        request
    };
    let builder = SelamLayer::builder().with_api_key(key()).with_jwt(&tokens);
    let error =
        send(&builder.clone().build().unwrap(), elsewhere("https://other.example/")).await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed);
    let layer = builder.with_origins(Origins::selam().strip_for_other_origins()).build().unwrap();
    let request = send(&layer, elsewhere("https://other.example/")).await.unwrap();
    assert_eq!(auth_headers(&request), (vec![], vec![]));
    assert_eq!((fetch_count(&fetches, "one"), tokens.len()), (0, 0));

    // Once the subject has a JWT, it is stripped from the query for other origins, and so is the key.
    tokens.of_subject(&Subject::new("one")).prefetch().await.unwrap();
    let leaky = format!("https://other.example/?token=jwt-of-one-1&api_key={KEY}&x=1");
    let request = send(&layer, elsewhere(&leaky)).await.unwrap();
    assert_eq!(request.uri().query(), Some("x=1"));
    let request = send(&layer, with_auth(elsewhere(&leaky), RequestAuth::Anonymous)).await.unwrap();
    assert_eq!(request.uri().query(), Some("x=1"));
}

/// F1: 10,000 concurrent requests of 100 subjects fetch one JWT for each subject.
#[tokio::test(start_paused = true)]
async fn concurrent_requests_fetch_once_per_subject() {
    let (tokens, fetches) = mint(SECOND / 5);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&tokens).build().unwrap();
    let api = service_fn(|request: Request<Body>| {
        let jwt = request.headers()["authorization"].to_str().unwrap().to_owned();
        ready(Ok::<_, Infallible>(Response::new(Body::from(jwt))))
    });
    let service = layer.layer(api);
    let mut calls = JoinSet::new();
    for call in 0..10_000 {
        let name = format!("user-{}", call % 100);
        let mut request = Request::get(MODELS).body(Body::default()).unwrap();
        request.extensions_mut().insert(Subject::new(&*name));
        calls.spawn({
            let service = service.clone();
            async move {
                let answer = service.oneshot(request).await.unwrap();
                let jwt = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
                assert_eq!(jwt, format!("Bearer jwt-of-{name}-1"));
            }
        });
    }
    calls.join_all().await;
    let fetches = fetches.lock().unwrap();
    assert!(fetches.len() == 100 && fetches.values().all(|times| *times == 1));
}

/// J2: a rejected JWT is refreshed for its own subject alone.
#[tokio::test(start_paused = true)]
async fn rejected_jwt_is_refreshed_for_its_subject() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let api = service_fn(|request: Request<Body>| {
        let revoked = request.headers()["authorization"] == "Bearer jwt-of-one-1";
        ready(Ok::<_, Infallible>(response(if revoked { 401 } else { 200 }, "")))
    });
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&tokens).build().unwrap();
    let service = layer.layer(api);
    for name in ["two", "one", "two", "one"] {
        let mut request = Request::get(MODELS).body(Body::default()).unwrap();
        request.extensions_mut().insert(Subject::new(name));
        assert_eq!(service.clone().oneshot(request).await.unwrap().status(), StatusCode::OK);
    }
    assert_eq!((fetch_count(&fetches, "one"), fetch_count(&fetches, "two")), (2, 1));
}

/// H5: a rotated key is sent with the JWT of every subject.
#[tokio::test(start_paused = true)]
async fn rotated_key_reaches_every_subject() {
    let (tokens, _) = mint(Duration::ZERO);
    let present = Arc::new(Mutex::new("sk-selam-first".to_owned()));
    let keys = Refreshing::new(source_fn({
        let present = Arc::clone(&present);
        move |_: Reason<ApiKey>| ready(ApiKey::new(present.lock().unwrap().clone()).map_err(BoxError::from))
    }));
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(&keys));
    for expected in ["sk-selam-first", "sk-selam-second"] {
        for name in ["one", "two"] {
            let request = send(&layer, request_of(name)).await.unwrap();
            assert_eq!(
                auth_headers(&request),
                (vec![format!("Bearer jwt-of-{name}-1")], vec![expected.to_owned()])
            );
        }
        *present.lock().unwrap() = "sk-selam-second".to_owned();
        keys.rejected(&keys.current().unwrap());
        settle().await;
    }
}

/// Layers that share a `PerSubject` share its JWTs, not their keys.
#[tokio::test(start_paused = true)]
async fn layers_sharing_jwts_keep_their_own_keys() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let layers = ["sk-selam-a", "sk-selam-b"]
        .map(|key| (key, (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(ApiKey::new(key).unwrap()))));
    for _ in 0..3 {
        for (key, layer) in &layers {
            let request = send(layer, request_of("one")).await.unwrap();
            assert_eq!(
                auth_headers(&request),
                (vec!["Bearer jwt-of-one-1".to_owned()], vec![(*key).to_owned()])
            );
        }
    }
    assert_eq!(fetch_count(&fetches, "one"), 1);
}

/// No more subjects are kept than the capacity allows.
#[tokio::test(start_paused = true)]
async fn capacity_bounds_the_subjects_kept() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let tokens = tokens.with_capacity(100);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    for index in 0..1_000 {
        let name = format!("user-{index}");
        assert_eq!(
            auth_headers(&send(&layer, request_of(&name)).await.unwrap()),
            jwt_and_key(&format!("jwt-of-{name}-1"))
        );
        assert!(tokens.len() <= 100, "{}", tokens.len());
    }
    assert_eq!(fetches.lock().unwrap().len(), 1_000);
}

/// F1: a subject whose JWT is being fetched is not evicted when the capacity is reached.
#[tokio::test(start_paused = true)]
async fn subject_is_not_evicted_during_its_fetch() {
    let (tokens, fetches) = mint(SECOND);
    let tokens = tokens.with_capacity(1);
    let names = ["one", "two", "three", "four"].map(Subject::new);
    for _ in 0..3 {
        let mut calls: Vec<_> =
            names.iter().map(|name| tokio_test::task::spawn(fetch_token(&tokens, name))).collect();
        for call in &mut calls {
            assert!(call.poll().is_pending());
        }
        settle().await;
    }
    for name in &names {
        assert_eq!(fetch_count(&fetches, name.as_str()), 1, "{name:?}");
    }
}

async fn fetch_token(tokens: &PerSubject, subject: &Subject) -> Result<Token, AuthError> {
    tokens.of_subject(subject).token().await
}

/// Sends a request whose 401 arrives only after another layer used the same subject, or after other subjects filled the
/// cache. Returns the final status and how often the subject's JWT was fetched.
async fn reject_late(same_subject: bool, capacity: usize) -> (u16, usize) {
    let (tokens, fetches) = mint(Duration::ZERO);
    let tokens = tokens.with_capacity(capacity);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let slow_api = service_fn({
        let gate = Arc::clone(&gate);
        move |request: Request<Body>| {
            let gate = Arc::clone(&gate);
            async move {
                let revoked = request.headers()["authorization"] == "Bearer jwt-of-one-1";
                if revoked {
                    let _ = gate.acquire().await.unwrap();
                }
                Ok::<_, Infallible>(response(if revoked { 401 } else { 200 }, ""))
            }
        }
    });
    let fast_api = service_fn(|_: Request<Body>| ready(Ok::<_, Infallible>(response(200, ""))));
    let a = SelamLayer::builder().with_api_key(key()).with_jwt(&tokens).build().unwrap();
    let b = SelamLayer::builder().with_api_key(key()).with_jwt(&tokens).build().unwrap();
    let ask = |name: &str| {
        let mut request = Request::get(MODELS).body(Body::default()).unwrap();
        request.extensions_mut().insert(Subject::new(name));
        request
    };
    let first = tokio::spawn(a.layer(slow_api).oneshot(ask("one")));
    settle().await;
    if same_subject {
        // Another layer over the same tokens, for the same subject.
        assert_eq!(b.layer(fast_api).oneshot(ask("one")).await.unwrap().status(), 200);
    } else {
        for n in 0..8 {
            assert_eq!(a.layer(fast_api).oneshot(ask(&format!("other-{n}"))).await.unwrap().status(), 200);
        }
    }
    gate.add_permits(10);
    let status = first.await.unwrap().map_or(401, |response| response.status().as_u16());
    (status, fetch_count(&fetches, "one"))
}

/// J2: a late 401 is refreshed and replayed even if another layer has used the same subject since.
#[tokio::test(start_paused = true)]
async fn second_layer_does_not_prevent_the_refresh() {
    assert_eq!(reject_late(true, 100).await, (200, 2));
}

/// J2: a late 401 is refreshed and replayed even if its subject was evicted meanwhile.
#[tokio::test(start_paused = true)]
async fn late_401_is_replayed_after_eviction() {
    assert_eq!(reject_late(false, 2).await.0, 200);
}

/// Subjects that wait for a slow source are bounded: more are refused until it answers and some can be evicted.
#[tokio::test(start_paused = true)]
async fn subjects_waiting_for_a_slow_source_are_bounded() {
    let (tokens, _) = mint(20 * SECOND);
    let tokens = tokens.with_capacity(10);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    let (client, _sent) = tower_test::mock::pair::<Request<()>, Response<Body>>();
    let service = layer.layer(client);
    let mut refused = 0;
    for index in 0..5_000 {
        let mut call = tokio_test::task::spawn(service.clone().oneshot(request_of(&format!("user-{index}"))));
        if let std::task::Poll::Ready(result) = call.poll() {
            let error = result.unwrap_err();
            let error = AuthError::find(&*error).unwrap();
            assert_eq!((error.kind(), error.retry_after()), (AuthErrorKind::RefreshFailed, Some(SECOND)));
            refused += 1;
        }
    }
    assert!(tokens.len() < 80, "{}", tokens.len());
    assert_eq!(refused + tokens.len(), 5_000);

    // The refreshes take two turns.
    sleep(41 * SECOND).await;
    let late = tokio_test::task::spawn(service.oneshot(request_of("late"))).poll().is_pending();
    assert!(late && tokens.len() <= 11, "{}", tokens.len());
}

/// After a flood of subjects, the ones used since are still kept.
#[tokio::test(start_paused = true)]
async fn flood_does_not_evict_recent_subjects() {
    let (tokens, fetches) = mint(SECOND);
    let tokens = tokens.with_capacity(100);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    let mut flood: Vec<_> = (0..180)
        .map(|index| {
            let name = Subject::new(format!("flood-{index}"));
            tokio_test::task::spawn({
                let tokens = tokens.clone();
                async move { fetch_token(&tokens, &name).await }
            })
        })
        .collect();
    for call in &mut flood {
        let _ = call.poll();
    }
    assert!(tokens.len() > 150, "{}", tokens.len());
    sleep(4 * SECOND).await;
    drop(flood);
    for index in 0..50 {
        send(&layer, request_of(&format!("flood-{index}"))).await.unwrap();
    }

    // The new subject displaces subjects that were seen only during the flood.
    advance(SECOND).await;
    send(&layer, request_of("new")).await.unwrap();
    // The cache also evicts some subjects by itself, first those that were used once.
    assert!((51..=101).contains(&tokens.len()), "{}", tokens.len());
    for index in 0..50 {
        let name = format!("flood-{index}");
        send(&layer, request_of(&name)).await.unwrap();
        assert_eq!(fetch_count(&fetches, &name), 1, "{name}");
    }
}

/// A subject with a 300-byte JWT costs less than 1 KiB.
#[test]
fn subject_costs_less_than_a_kibibyte() {
    const SUBJECTS: usize = 2_000;
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tokens = PerSubject::new(|subject: &Subject| {
        let subject = subject.clone();
        source_fn(move |_: Reason<Token>| {
            // 300 bytes with the name, about the length of a JWT.
            ready(Token::new(format!("{:a<290}{}", "jwt-of-", subject.as_str())).map_err(BoxError::from))
        })
    });
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    let ask = |index: usize| runtime.block_on(send(&layer, request_of(&format!("user-{index:05}")))).unwrap();
    ask(SUBJECTS);
    let kept = allocation_counter::measure(|| (0..SUBJECTS).for_each(|index| drop(ask(index))));
    let each = usize::try_from(kept.bytes_current).unwrap() / SUBJECTS;
    assert_eq!(tokens.len(), SUBJECTS + 1);
    assert!((300..1_024).contains(&each), "{each} bytes per subject");
}

/// A source that records who is being refreshed, and takes this long, or hangs.
fn recording(
    fetch_time: impl Fn(&str) -> Option<Duration> + Send + Sync + 'static,
) -> (PerSubject, Arc<Mutex<Vec<String>>>, Arc<AtomicUsize>) {
    let (started, running, most) =
        (Arc::<Mutex<Vec<String>>>::default(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (log, peak) = (Arc::clone(&started), Arc::clone(&most));
    let tokens = PerSubject::new(move |subject: &Subject| {
        let (name, time) = (subject.as_str().to_owned(), fetch_time(subject.as_str()));
        let (log, peak, running) = (Arc::clone(&log), Arc::clone(&peak), Arc::clone(&running));
        source_fn(move |_: Reason<Token>| {
            log.lock().unwrap().push(name.clone());
            let guard = Running::start(&running, &peak);
            let text = format!("jwt-of-{name}");
            async move {
                match time {
                    Some(time) => sleep(time).await,
                    None => std::future::pending().await,
                }
                drop(guard);
                Ok::<_, BoxError>(Fetched::new(Token::new(text)?).with_lifetime(60 * MINUTE))
            }
        })
    });
    (tokens, started, most)
}

/// Counts how many fetches run at once.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn start(running: &Arc<AtomicUsize>, most: &AtomicUsize) -> Self {
        most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
        Self(Arc::clone(running))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// M2: after a restart, a few refreshes run at once, in the order of the first requests. Callers may leave at any time.
#[tokio::test(start_paused = true)]
async fn refreshes_wait_for_their_turn() {
    for (concurrency, most_expected, seconds) in [(1, 1, 200), (8, 8, 25), (0, 1, 200), (1_000, 200, 1)] {
        let (tokens, started, most) = recording(|_| Some(SECOND));
        let tokens = tokens.with_concurrency(concurrency);
        let start = Instant::now();
        let mut calls = Vec::new();
        for index in 0..200 {
            let (tokens, subject) = (tokens.clone(), Subject::new(format!("user-{index:03}")));
            let call = tokio::spawn(async move { fetch_token(&tokens, &subject).await });
            settle().await;
            // Every third caller leaves, and its subject's refresh stays in the queue.
            if index % 3 == 0 {
                call.abort();
            } else {
                calls.push(call);
            }
        }
        for call in calls {
            call.await.unwrap().unwrap();
        }
        assert_eq!((most.load(SeqCst), start.elapsed().as_secs()), (most_expected, seconds));
        let started = started.lock().unwrap();
        assert!(started.len() == 200 && started.is_sorted(), "{started:?}");
    }
}

/// M2, F4: a source that hangs holds the others until its timeout, and theirs starts when their turn has come.
#[tokio::test(start_paused = true)]
async fn hanging_source_holds_others_until_its_timeout() {
    let (tokens, ..) = recording(|name| (name != "hangs").then_some(29 * SECOND));
    let tokens = tokens.with_concurrency(1);
    let start = Instant::now();
    let calls = ["hangs", "second", "third"].map(|name| {
        let tokens = tokens.clone();
        tokio::spawn(async move {
            (fetch_token(&tokens, &Subject::new(name)).await.is_ok(), start.elapsed().as_secs())
        })
    });
    for (call, expected) in calls.into_iter().zip([(false, 30), (true, 59), (true, 88)]) {
        assert_eq!(call.await.unwrap(), expected);
    }
}

/// M2, F4: so does a runtime that nobody drives, and one that shuts down holds nobody.
#[test]
fn idle_runtime_holds_others_until_the_timeout() {
    let runtime = || runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    for shuts_down in [false, true] {
        let (tokens, ..) = recording(|_| Some(SECOND));
        let tokens = tokens.with_concurrency(1);
        let idle = runtime();
        idle.block_on(async {
            for name in ["running", "waiting"] {
                let subject = Subject::new(name);
                assert!(tokio_test::task::spawn(fetch_token(&tokens, &subject)).poll().is_pending());
            }
        });
        let idle = (!shuts_down).then_some(idle);
        runtime().block_on(async {
            let start = Instant::now();
            fetch_token(&tokens, &Subject::new("other")).await.unwrap();
            // One refresh after the other exceeds the timeout, and is abandoned a second later.
            assert_eq!(start.elapsed().as_secs(), if shuts_down { 1 } else { 63 });
        });
        drop(idle);
    }
}

/// M2, F7: a source that waits for another subject's token, whether that is being fetched or not, gets it out of turn.
#[tokio::test(start_paused = true)]
async fn source_may_wait_for_another_subject() {
    for is_queued in [false, true] {
        let set: Arc<Mutex<Option<PerSubject>>> = Arc::default();
        let tokens = PerSubject::new({
            let set = Arc::clone(&set);
            move |subject: &Subject| {
                let (set, name) = (Arc::clone(&set), subject.as_str().to_owned());
                source_fn(move |_: Reason<Token>| {
                    let (set, name) = (set.lock().unwrap().clone().unwrap(), name.clone());
                    async move {
                        sleep(SECOND).await;
                        if let Some(depth) = name.parse::<u32>().ok().filter(|depth| *depth > 0) {
                            set.of_subject(&Subject::new((depth - 1).to_string())).token().await?;
                        }
                        Ok::<_, BoxError>(Token::new(format!("jwt-of-{name}"))?)
                    }
                })
            }
        });
        let tokens = tokens.with_concurrency(1);
        *set.lock().unwrap() = Some(tokens.clone());
        let start = Instant::now();
        let deepest = Subject::new("5");
        let mut call = tokio_test::task::spawn(fetch_token(&tokens, &deepest));
        assert!(call.poll().is_pending());
        if is_queued {
            let next = Subject::new("4");
            assert!(tokio_test::task::spawn(fetch_token(&tokens, &next)).poll().is_pending());
        }
        call.await.unwrap();
        assert_eq!(start.elapsed().as_secs(), 6);
        *set.lock().unwrap() = None;
    }
}

/// Fails for the subjects whose names begin with `failing`.
fn failing_mint() -> (PerSubject, Fetches) {
    let fetches = Fetches::default();
    let tokens = PerSubject::new({
        let fetches = Arc::clone(&fetches);
        move |subject: &Subject| {
            let (fetches, name) = (Arc::clone(&fetches), subject.as_str().to_owned());
            source_fn(move |_: Reason<Token>| {
                *fetches.lock().unwrap().entry(name.clone()).or_default() += 1;
                ready(if name.starts_with("failing") {
                    Err(SourceError::permanent("there is no such user"))
                } else {
                    Ok(Fetched::new(Token::new(format!("jwt-of-{name}-1")).unwrap())
                        .with_lifetime(60 * MINUTE))
                })
            })
        }
    });
    (tokens, fetches)
}

/// M2: the back-off of failing subjects survives the arrival of others, and their idle time.
#[tokio::test(start_paused = true)]
async fn back_off_survives_eviction() {
    let (tokens, fetches) = failing_mint();
    let tokens = tokens.with_capacity(80).with_idle_time(MINUTE);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    let failing = || async {
        for index in 0..5 {
            let error = send(&layer, request_of(&format!("failing-{index}"))).await.unwrap_err();
            assert_eq!(error.kind(), AuthErrorKind::RefreshRejected);
        }
    };
    for round in 0..4 {
        failing().await;
        for index in 0..500 {
            send(&layer, request_of(&format!("user-{round}-{index}"))).await.unwrap();
        }
        assert!(tokens.len() <= 90, "{}", tokens.len());
        advance(MINUTE).await;
        send(&layer, request_of("busy")).await.unwrap();
        settle().await;
    }
    for index in 0..5 {
        assert_eq!(fetch_count(&fetches, &format!("failing-{index}")), 1);
    }
    assert!(tokens.forget(&Subject::new("failing-0")) && !tokens.forget(&Subject::new("failing-0")));
    // They are probed after five minutes, and nothing is left of those that do not return.
    advance(2 * MINUTE).await;
    failing().await;
    assert_eq!(fetch_count(&fetches, "failing-1"), 2);
    advance(6 * MINUTE).await;
    send(&layer, request_of("busy")).await.unwrap();
    settle().await;
    assert_eq!(tokens.len(), 1);
}

/// M2: a flood of failing subjects fills no memory and locks nobody out.
#[tokio::test(start_paused = true)]
async fn flood_of_failing_subjects_is_bounded() {
    let (tokens, fetches) = failing_mint();
    let tokens = tokens.with_capacity(100);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    for round in 0..100 {
        for index in 0..100 {
            let error = send(&layer, request_of(&format!("failing-{round}-{index}"))).await.unwrap_err();
            assert_eq!(error.kind(), AuthErrorKind::RefreshRejected);
            assert!(tokens.len() <= 120, "{}", tokens.len());
        }
        for index in 0..20 {
            for name in [format!("user-{index}"), format!("new-{round}-{index}")] {
                send(&layer, request_of(&name)).await.unwrap();
            }
        }
    }
    let refetched: usize = (0..20).map(|index| fetch_count(&fetches, &format!("user-{index}"))).sum();
    assert!(refetched < 60, "{refetched} fetches for 20 users");
}

/// An idle subject is evicted by the requests of others; a busy one is kept.
#[tokio::test(start_paused = true)]
async fn idle_subject_is_evicted() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let tokens = tokens.with_idle_time(MINUTE);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    send(&layer, request_of("idle")).await.unwrap();
    for _ in 0..6 {
        send(&layer, request_of("busy")).await.unwrap();
        settle().await;
        assert_eq!(tokens.len(), 2, "nobody was idle for a minute");
        advance(10 * SECOND).await;
    }
    send(&layer, request_of("new")).await.unwrap();
    settle().await;
    assert_eq!(tokens.len(), 2, "`busy` and `new`");
    for name in ["busy", "new", "idle"] {
        send(&layer, request_of(name)).await.unwrap();
    }
    assert_eq!(
        (fetch_count(&fetches, "busy"), fetch_count(&fetches, "new"), fetch_count(&fetches, "idle")),
        (1, 1, 2)
    );
}

/// Idle subjects are also evicted if only known subjects send requests.
#[tokio::test(start_paused = true)]
async fn known_subjects_evict_idle_ones() {
    let clock = TestClock::new(std::time::UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let (tokens, _) = mint(Duration::ZERO);
    let policy = RefreshPolicy::new().with_clock(clock.clone());
    let tokens = tokens.with_policy(policy).with_idle_time(2 * MINUTE);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    send(&layer, request_of("idle")).await.unwrap();
    send(&layer, request_of("busy")).await.unwrap();
    advance(MINUTE).await;
    send(&layer, request_of("busy")).await.unwrap();
    settle().await;
    assert_eq!(tokens.len(), 2);
    for _ in 0..2 {
        advance(MINUTE).await;
        send(&layer, request_of("busy")).await.unwrap();
        settle().await;
    }
    assert_eq!(tokens.len(), 1);
}

/// `forget` removes a subject, whose next request fetches a new JWT.
#[tokio::test(start_paused = true)]
async fn forget_removes_a_subject() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    send(&layer, request_of("one")).await.unwrap();
    assert!(tokens.forget(&Subject::new("one")) && !tokens.forget(&Subject::new("one")));
    assert!(tokens.is_empty());
    assert_eq!(auth_headers(&send(&layer, request_of("one")).await.unwrap()), jwt_and_key("jwt-of-one-2"));
    assert_eq!(fetch_count(&fetches, "one"), 2);
}

/// R1: a request of a known subject allocates nothing.
#[tokio::test(start_paused = true)]
async fn request_of_a_known_subject_allocates_nothing() {
    let (tokens, _) = mint(Duration::ZERO);
    let subjects: Vec<_> = (0..10).map(|index| Subject::new(format!("user-{index}"))).collect();
    let api = service_fn(|request: Request<Body>| {
        std::mem::forget(request.into_parts().0.headers);
        ready(Ok::<_, BoxError>(Response::new(Body::default())))
    });
    let mut service = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key())).layer(api);
    for turn in 0..3 {
        for subject in &subjects {
            let mut request = Request::get(MODELS).header("accept", "*/*").body(Body::default()).unwrap();
            request.extensions_mut().insert(subject.clone());
            tokens.of_subject(subject).prefetch().await.unwrap();
            let mut request = Some(request);
            let counted = allocation_counter::measure(|| {
                let mut call = pin!(service.call(request.take().unwrap()));
                assert!(call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
            });
            assert!(turn == 0 || counted.count_total == 0, "{}", counted.count_total);
        }
    }
}

/// Each of 100,000 subjects gets its own JWT, fetched once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundred_thousand_subjects_keep_their_own_jwts() {
    let (tokens, fetches) = mint(Duration::ZERO);
    let layer = (JwtLayer::new(&tokens), ApiKeyLayer::x_api_key(key()));
    let api = service_fn(|request: Request<()>| {
        let jwt = request.headers()["authorization"].clone();
        ready(Ok::<_, BoxError>(Response::new(jwt)))
    });
    let service = layer.layer(api);
    let subjects = 100_000;
    // Every subject once, and then every tenth again.
    for step in [1, 10] {
        let mut calls = JoinSet::new();
        for worker in 0..2 {
            let mut service = service.clone();
            calls.spawn(async move {
                for index in (0..subjects).skip(worker * step).step_by(2 * step) {
                    let response = service
                        .ready()
                        .await
                        .unwrap()
                        .call(request_of(&format!("user-{index}")))
                        .await
                        .unwrap();
                    assert_eq!(response.into_body(), format!("Bearer jwt-of-user-{index}-1"));
                }
            });
        }
        calls.join_all().await;
    }
    assert_eq!(tokens.len(), subjects);
    assert!(fetches.lock().unwrap().values().all(|times| *times == 1));
}
