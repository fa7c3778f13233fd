//! A JWT for each user: H4, F1, J2 and R1 by subject, and who is remembered.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::ready,
    pin::pin,
    sync::{Arc, Mutex},
    task::{Context, Waker},
    time::Duration,
};

use http::{Request, Response, StatusCode, header::LOCATION};
use tokio::{
    runtime,
    task::JoinSet,
    time::{advance, sleep},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, BoxError, JwtLayer, Origins, PerSubject, RefreshPolicy,
    Refreshing, RequestAuth, SelamLayer, Subject, TestClock, Token,
    source::{Fetched, Reason, source_fn},
};

use crate::support::{Body, KEY, MODELS, get, handshake, jwt, key, response, send, values};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// How often each subject's token was fetched.
type Asked = Arc<Mutex<HashMap<String, usize>>>;

/// Gives `jwt-of-NAME-1`, then `-2`; each takes so long and lives an hour.
fn mint(takes: Duration) -> (PerSubject, Asked) {
    let asked = Asked::default();
    let tokens = PerSubject::new({
        let asked = Arc::clone(&asked);
        move |subject: &Subject| {
            let (asked, name) = (Arc::clone(&asked), subject.as_str().to_owned());
            source_fn(move |_: Reason<Token>| {
                let number = {
                    let mut asked = asked.lock().unwrap();
                    let count = asked.entry(name.clone()).or_default();
                    *count += 1;
                    *count
                };
                let text = format!("jwt-of-{name}-{number}");
                async move {
                    // Even the shortest sleep takes a millisecond.
                    if !takes.is_zero() {
                        sleep(takes).await;
                    }
                    Ok::<_, BoxError>(Fetched::new(Token::new(text)?).with_lifetime(60 * MINUTE))
                }
            })
        }
    });
    (tokens, asked)
}

fn times(asked: &Asked, name: &str) -> usize {
    asked.lock().unwrap().get(name).copied().unwrap_or_default()
}

fn of(name: &str) -> Request<()> {
    let mut request = get(MODELS);
    request.extensions_mut().insert(Subject::new(name));
    request
}

fn with(mut request: Request<()>, auth: RequestAuth) -> Request<()> {
    request.extensions_mut().insert(auth);
    request
}

fn sent(request: &Request<()>) -> (Vec<String>, Vec<String>) {
    (values(request, "authorization"), values(request, "x-api-key"))
}

fn pair(jwt: &str) -> (Vec<String>, Vec<String>) {
    (vec![format!("Bearer {jwt}")], vec![KEY.to_owned()])
}

/// Lets the tasks that are ready run.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn h4_each_request_has_its_own_users_jwt_and_no_other() {
    let (tokens, asked) = mint(Duration::ZERO);
    let layer = JwtLayer::new(&tokens, key());
    for name in ["one", "two", "one", "three", "two"] {
        let request = send(&layer, of(name)).await.unwrap();
        assert_eq!(sent(&request), pair(&format!("jwt-of-{name}-1")));
    }
    assert_eq!((times(&asked, "one"), tokens.len()), (1, 3));

    // The next request without a name does not have the last one's.
    let refused = send(&layer, get(MODELS)).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::CredentialUnavailable);
    assert!(refused.to_string().contains("names no `Subject`"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn h4_a_name_goes_with_every_choice_of_credentials() {
    let (tokens, asked) = mint(Duration::ZERO);
    let layer = JwtLayer::new(&tokens, key());
    let request = send(&layer, with(of("one"), RequestAuth::ApiKeyAndJwt)).await.unwrap();
    assert_eq!(sent(&request), pair("jwt-of-one-1"));

    for request in [of("nobody"), get(MODELS)] {
        let request = send(&layer, with(request, RequestAuth::ApiKey)).await.unwrap();
        assert_eq!(sent(&request), (vec![format!("Bearer {KEY}")], vec![]));
    }
    let request = send(&layer, with(of("nobody"), RequestAuth::Anonymous)).await.unwrap();
    assert_eq!(sent(&request), (vec![], vec![]));
    assert_eq!((times(&asked, "nobody"), tokens.len()), (0, 1), "whose token is not wanted is not fetched");

    let mut agent = handshake("wss://api.selamgpt.com/v1/audio/agent?voice=mekdes");
    agent.extensions_mut().insert(Subject::new("two"));
    let agent = send(&layer, agent).await.unwrap();
    assert_eq!(agent.uri().query(), Some(&*format!("voice=mekdes&token=jwt-of-two-1&api_key={KEY}")));
}

#[tokio::test(start_paused = true)]
async fn h4_a_layer_that_has_one_jwt_or_none_refuses_a_name() {
    let renewing = Refreshing::new(source_fn(|_: Reason<Token>| ready(Ok::<_, BoxError>(jwt()))));
    renewing.prefetch().await.unwrap();
    let refused = |result: Result<Request<()>, AuthError>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
        assert!(error.to_string().contains("the same credentials for all"), "{error}");
    };
    for layer in
        [JwtLayer::new(jwt(), key()), JwtLayer::new(&renewing, key()), JwtLayer::beside_api_key(jwt())]
    {
        refused(send(&layer, of("one")).await);
    }
    for layer in [ApiKeyLayer::bearer(key()), ApiKeyLayer::x_api_key(key())] {
        refused(send(&layer, of("one")).await);
    }
    refused(send(&SelamLayer::builder().with_api_key(key()).build().unwrap(), of("one")).await);
    // What asks for the key alone, or for nothing, does not want the name's JWT.
    for auth in [RequestAuth::ApiKey, RequestAuth::Anonymous] {
        send(&JwtLayer::new(jwt(), key()), with(of("one"), auth)).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn h4_two_layers_beside_each_other_take_a_name_in_either_order() {
    let (tokens, _) = mint(Duration::ZERO);
    let (jwt, key) = (JwtLayer::beside_api_key(&tokens), ApiKeyLayer::beside_jwt(key()));
    let outside = ServiceBuilder::new().layer(jwt.clone()).layer(key.clone()).into_inner();
    let inside = ServiceBuilder::new().layer(key).layer(jwt).into_inner();
    assert_eq!(sent(&send(&outside, of("one")).await.unwrap()), pair("jwt-of-one-1"));
    assert_eq!(sent(&send(&inside, of("one")).await.unwrap()), pair("jwt-of-one-1"));
}

#[tokio::test(start_paused = true)]
async fn h4_a_redirect_that_loses_the_name_fails_closed() {
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
        .layer(JwtLayer::new(&tokens, key()).with_origins(origins))
        .service(api);
    let error = service.oneshot(of("one").map(|()| Body::default())).await.unwrap_err();
    let error = AuthError::find(&*error).unwrap();
    assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
    assert_eq!(*seen.lock().unwrap(), [MODELS]);
}

#[tokio::test(start_paused = true)]
async fn o1_nobody_is_asked_about_for_a_request_that_may_not_be_sent() {
    let (tokens, asked) = mint(Duration::ZERO);
    let elsewhere = |uri| {
        let mut request = get(uri);
        request.extensions_mut().insert(Subject::new("one"));
        request
    };
    let layer = JwtLayer::new(&tokens, key());
    let error = send(&layer, elsewhere("https://other.example/")).await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::OriginNotAllowed);
    let layer = layer.with_origins(Origins::selam().strip_for_other_origins());
    let request = send(&layer, elsewhere("https://other.example/")).await.unwrap();
    assert_eq!(sent(&request), (vec![], vec![]));
    assert_eq!((times(&asked, "one"), tokens.len()), (0, 0));

    // Once there is one, it is taken out of where it does not belong, and so is the key.
    tokens.of_subject(&Subject::new("one")).prefetch().await.unwrap();
    let leaky = format!("https://other.example/?token=jwt-of-one-1&api_key={KEY}&x=1");
    let request = send(&layer, elsewhere(&leaky)).await.unwrap();
    assert_eq!(request.uri().query(), Some("x=1"));
    let request = send(&layer, with(elsewhere(&leaky), RequestAuth::Anonymous)).await.unwrap();
    assert_eq!(request.uri().query(), Some("x=1"));
}

#[tokio::test(start_paused = true)]
async fn f1_there_is_one_renewal_for_each_subject_however_many_ask() {
    let (tokens, asked) = mint(SECOND / 5);
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
    let asked = asked.lock().unwrap();
    assert!(asked.len() == 100 && asked.values().all(|times| *times == 1));
}

#[tokio::test(start_paused = true)]
async fn j2_a_refused_jwt_is_renewed_for_its_user_alone() {
    let (tokens, asked) = mint(Duration::ZERO);
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
    assert_eq!((times(&asked, "one"), times(&asked, "two")), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn h5_a_rotated_key_reaches_every_user() {
    let (tokens, _) = mint(Duration::ZERO);
    let present = Arc::new(Mutex::new("sk-selam-first".to_owned()));
    let keys = Refreshing::new(source_fn({
        let present = Arc::clone(&present);
        move |_: Reason<ApiKey>| ready(ApiKey::new(present.lock().unwrap().clone()).map_err(BoxError::from))
    }));
    let layer = JwtLayer::new(&tokens, &keys);
    for expected in ["sk-selam-first", "sk-selam-second"] {
        for name in ["one", "two"] {
            let request = send(&layer, of(name)).await.unwrap();
            assert_eq!(sent(&request), (vec![format!("Bearer jwt-of-{name}-1")], vec![expected.to_owned()]));
        }
        *present.lock().unwrap() = "sk-selam-second".to_owned();
        keys.invalidate(&keys.current().unwrap());
        settle().await;
    }
}

#[tokio::test(start_paused = true)]
async fn layers_that_share_the_tokens_keep_their_keys_apart() {
    let (tokens, asked) = mint(Duration::ZERO);
    let layers =
        ["sk-selam-a", "sk-selam-b"].map(|key| (key, JwtLayer::new(&tokens, ApiKey::new(key).unwrap())));
    for _ in 0..3 {
        for (key, layer) in &layers {
            let request = send(layer, of("one")).await.unwrap();
            assert_eq!(sent(&request), (vec!["Bearer jwt-of-one-1".to_owned()], vec![(*key).to_owned()]));
        }
    }
    assert_eq!(times(&asked, "one"), 1);
}

#[tokio::test(start_paused = true)]
async fn no_more_are_remembered_than_there_is_room_for() {
    let (tokens, asked) = mint(Duration::ZERO);
    let tokens = tokens.with_capacity(100);
    let layer = JwtLayer::new(&tokens, key());
    for user in 0..1_000 {
        let name = format!("user-{user}");
        assert_eq!(sent(&send(&layer, of(&name)).await.unwrap()), pair(&format!("jwt-of-{name}-1")));
        assert!(tokens.len() <= 100, "{}", tokens.len());
    }
    assert_eq!(asked.lock().unwrap().len(), 1_000);
}

#[tokio::test(start_paused = true)]
async fn f1_who_is_being_fetched_is_not_forgotten_for_want_of_room() {
    let (tokens, asked) = mint(SECOND);
    let tokens = tokens.with_capacity(1);
    let names = ["one", "two", "three", "four"].map(Subject::new);
    for _ in 0..3 {
        let mut calls: Vec<_> =
            names.iter().map(|name| tokio_test::task::spawn(send_token(&tokens, name))).collect();
        for call in &mut calls {
            assert!(call.poll().is_pending());
        }
        settle().await;
    }
    for name in &names {
        assert_eq!(times(&asked, name.as_str()), 1, "{name:?}");
    }
}

async fn send_token(tokens: &PerSubject, subject: &Subject) -> Result<Token, AuthError> {
    tokens.of_subject(subject).token().await
}

/// What becomes of a request that is refused after another layer, or others, have taken its place: its status, and how
/// often the token was fetched.
async fn refused_late(same_user: bool, capacity: usize) -> (u16, usize) {
    let (tokens, asked) = mint(Duration::ZERO);
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
    if same_user {
        // another layer over the same tokens, for the same user
        assert_eq!(b.layer(fast_api).oneshot(ask("one")).await.unwrap().status(), 200);
    } else {
        for n in 0..8 {
            assert_eq!(a.layer(fast_api).oneshot(ask(&format!("other-{n}"))).await.unwrap().status(), 200);
        }
    }
    gate.add_permits(10);
    let status = first.await.unwrap().map_or(401, |response| response.status().as_u16());
    (status, times(&asked, "one"))
}

#[tokio::test(start_paused = true)]
async fn j2_a_second_layer_over_the_same_tokens_takes_no_renewal_away() {
    assert_eq!(refused_late(true, 100).await, (200, 2));
}

#[tokio::test(start_paused = true)]
async fn j2_a_request_of_one_who_is_forgotten_meanwhile_is_renewed_and_sent_again_all_the_same() {
    assert_eq!(refused_late(false, 2).await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn many_who_wait_for_a_source_that_hangs_are_bounded_and_make_room_when_it_ends() {
    let (tokens, _) = mint(20 * SECOND);
    let tokens = tokens.with_capacity(10);
    let layer = JwtLayer::new(&tokens, key());
    let (client, _sent) = tower_test::mock::pair::<Request<()>, Response<Body>>();
    let service = layer.layer(client);
    let mut refused = 0;
    for user in 0..5_000 {
        let mut call = tokio_test::task::spawn(service.clone().oneshot(of(&format!("user-{user}"))));
        if let std::task::Poll::Ready(result) = call.poll() {
            let error = result.unwrap_err();
            let error = AuthError::find(&*error).unwrap();
            assert_eq!((error.kind(), error.retry_after()), (AuthErrorKind::RefreshFailed, Some(SECOND)));
            refused += 1;
        }
    }
    assert!(tokens.len() < 80, "{}", tokens.len());
    assert_eq!(refused + tokens.len(), 5_000);

    sleep(21 * SECOND).await;
    let late = tokio_test::task::spawn(service.oneshot(of("late"))).poll().is_pending();
    assert!(late && tokens.len() <= 11, "{}", tokens.len());
}

#[tokio::test(start_paused = true)]
async fn after_a_flood_those_who_came_last_are_still_known() {
    let (tokens, asked) = mint(SECOND);
    let tokens = tokens.with_capacity(100);
    let layer = JwtLayer::new(&tokens, key());
    let mut flood: Vec<_> = (0..180)
        .map(|user| {
            let name = Subject::new(format!("flood-{user}"));
            tokio_test::task::spawn({
                let tokens = tokens.clone();
                async move { send_token(&tokens, &name).await }
            })
        })
        .collect();
    for call in &mut flood {
        let _ = call.poll();
    }
    assert!(tokens.len() > 150, "{}", tokens.len());
    sleep(2 * SECOND).await;
    drop(flood);
    for user in 0..50 {
        send(&layer, of(&format!("flood-{user}"))).await.unwrap();
    }

    // Room is made for one more, by those who were there for nothing else than the flood.
    advance(SECOND).await;
    send(&layer, of("new")).await.unwrap();
    // The cache makes some room by itself, and takes those for it who came once.
    assert!((51..=101).contains(&tokens.len()), "{}", tokens.len());
    for user in 0..50 {
        let name = format!("flood-{user}");
        send(&layer, of(&name)).await.unwrap();
        assert_eq!(times(&asked, &name), 1, "{name}");
    }
}

#[test]
fn what_is_kept_of_a_user_is_less_than_a_kibibyte() {
    const USERS: usize = 2_000;
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let tokens = PerSubject::new(|subject: &Subject| {
        let subject = subject.clone();
        source_fn(move |_: Reason<Token>| {
            // With the name, 300 bytes: as long as a JWT is.
            ready(Token::new(format!("{:a<290}{}", "jwt-of-", subject.as_str())).map_err(BoxError::from))
        })
    });
    let layer = JwtLayer::new(&tokens, key());
    let ask = |user: usize| runtime.block_on(send(&layer, of(&format!("user-{user:05}")))).unwrap();
    ask(USERS);
    let kept = allocation_counter::measure(|| (0..USERS).for_each(|user| drop(ask(user))));
    let each = usize::try_from(kept.bytes_current).unwrap() / USERS;
    assert_eq!(tokens.len(), USERS + 1);
    assert!((300..1_024).contains(&each), "{each} bytes for each");
}

#[tokio::test(start_paused = true)]
async fn who_does_not_come_for_a_while_is_forgotten_and_who_does_is_not() {
    let (tokens, asked) = mint(Duration::ZERO);
    let tokens = tokens.with_idle_time(MINUTE);
    let layer = JwtLayer::new(&tokens, key());
    send(&layer, of("idle")).await.unwrap();
    for _ in 0..7 {
        send(&layer, of("busy")).await.unwrap();
        advance(10 * SECOND).await;
    }
    assert_eq!(tokens.len(), 2, "nobody else has come");
    send(&layer, of("new")).await.unwrap();
    settle().await;
    assert_eq!(tokens.len(), 2);
    for name in ["busy", "new", "idle"] {
        send(&layer, of(name)).await.unwrap();
    }
    assert_eq!((times(&asked, "busy"), times(&asked, "new"), times(&asked, "idle")), (1, 1, 2));
}

#[tokio::test(start_paused = true)]
async fn idle_users_are_looked_for_when_a_token_is_renewed_too() {
    let clock = TestClock::new(std::time::UNIX_EPOCH + Duration::from_secs(1_900_000_000));
    let (tokens, _) = mint(Duration::ZERO);
    let policy = RefreshPolicy::new().with_clock(clock.clone());
    let tokens = tokens.with_policy(policy).with_idle_time(2 * MINUTE);
    let layer = JwtLayer::new(&tokens, key());
    send(&layer, of("idle")).await.unwrap();
    send(&layer, of("busy")).await.unwrap();
    for _ in 0..30 {
        advance(MINUTE).await;
        send(&layer, of("busy")).await.unwrap();
    }
    assert_eq!(tokens.len(), 2);
    for _ in 0..30 {
        advance(MINUTE).await;
        send(&layer, of("busy")).await.unwrap();
        settle().await;
    }
    assert_eq!(tokens.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_user_who_logs_out_is_forgotten() {
    let (tokens, asked) = mint(Duration::ZERO);
    let layer = JwtLayer::new(&tokens, key());
    send(&layer, of("one")).await.unwrap();
    assert!(tokens.forget(&Subject::new("one")) && !tokens.forget(&Subject::new("one")));
    assert!(tokens.is_empty());
    assert_eq!(sent(&send(&layer, of("one")).await.unwrap()), pair("jwt-of-one-2"));
    assert_eq!(times(&asked, "one"), 2);
}

#[tokio::test(start_paused = true)]
async fn r1_a_request_of_a_known_user_allocates_nothing() {
    let (tokens, _) = mint(Duration::ZERO);
    let subjects: Vec<_> = (0..10).map(|user| Subject::new(format!("user-{user}"))).collect();
    let api = service_fn(|request: Request<Body>| {
        std::mem::forget(request.into_parts().0.headers);
        ready(Ok::<_, BoxError>(Response::new(Body::default())))
    });
    let mut service = JwtLayer::new(&tokens, key()).layer(api);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_users_each_have_their_own() {
    let (tokens, asked) = mint(Duration::ZERO);
    let layer = JwtLayer::new(&tokens, key());
    let api = service_fn(|request: Request<()>| {
        let jwt = request.headers()["authorization"].clone();
        ready(Ok::<_, BoxError>(Response::new(jwt)))
    });
    let service = layer.layer(api);
    let users = 100_000;
    // Each once, and then every tenth of them again.
    for step in [1, 10] {
        let mut calls = JoinSet::new();
        for worker in 0..2 {
            let mut service = service.clone();
            calls.spawn(async move {
                for user in (0..users).skip(worker * step).step_by(2 * step) {
                    let response =
                        service.ready().await.unwrap().call(of(&format!("user-{user}"))).await.unwrap();
                    assert_eq!(response.into_body(), format!("Bearer jwt-of-user-{user}-1"));
                }
            });
        }
        calls.join_all().await;
    }
    assert_eq!(tokens.len(), users);
    assert!(asked.lock().unwrap().values().all(|times| *times == 1));
}
