//! The imperative form, for hosts that are not Tower: `SelamLayer::authorize` and `prefetch`.

use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use http::{HeaderMap, HeaderValue, Request, StatusCode, request::Parts};
use tokio::time::{Instant, advance, sleep};
use tokio_test::{assert_pending, task};
use tower_selam::{
    ApiKey, AuthErrorKind, Authorized, BoxError, Credentials, Origins, PerSubject, Refreshing, RequestAuth,
    SelamLayer, Subject, Token,
    oauth::{ClientAuth, OAuthSource, TokenEndpoint},
    simulator::Simulator,
    source::{Fetched, Reason, source_fn},
};

use crate::{
    api::{INVALID_KEY, INVALID_TOKEN, counting},
    mint::{Answer, MINUTE, Mint, SECOND, engine, settle},
    support::{Body, JWT, KEY, MODELS, bring_theirs, get, handshake, jwt, key, send},
};

const UNAUTHORIZED: StatusCode = StatusCode::UNAUTHORIZED;

fn head(request: Request<()>) -> Parts {
    request.into_parts().0
}

fn bearer(head: &Parts) -> &str {
    head.headers["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap()
}

async fn answer(authorized: &mut Authorized, status: StatusCode, body: &str) -> Result<bool, AuthErrorKind> {
    let answered = authorized.should_replay(status, &HeaderMap::new(), body.as_bytes()).await;
    answered.map_err(|error| error.kind())
}

/// A key that its source replaces by `-2`, `-3`, … whenever it is asked again.
fn rotating_keys() -> Refreshing<ApiKey> {
    let number = std::sync::atomic::AtomicUsize::new(0);
    Refreshing::new(source_fn(move |_: Reason<ApiKey>| {
        let key = ApiKey::new(format!("sk-selam-{}", number.fetch_add(1, SeqCst) + 1));
        async move { Ok::<_, BoxError>(key?) }
    }))
}

/// H0, H1, H2, H3, O1, O2, O3: head and error are those of the layer, for every choice of credentials.
#[tokio::test]
async fn head_is_that_of_the_layer() {
    let builder = || SelamLayer::builder().with_api_key(key());
    let strip = Origins::selam().strip_for_other_origins();
    let other = || ApiKey::new("sk-selam-other").unwrap();
    let choices = [
        None,
        Some(RequestAuth::ApiKey),
        Some(RequestAuth::ApiKeyAndJwt),
        Some(RequestAuth::Anonymous),
        Some(RequestAuth::Custom(Credentials::bearer(other()))),
        Some(RequestAuth::Custom(Credentials::x_api_key(other()))),
        Some(RequestAuth::Custom(Credentials::key_and_jwt(other(), jwt()))),
    ];
    let mut refused = 0;
    for layer in [
        builder(),
        builder().with_jwt(jwt()),
        builder().if_not_present(),
        builder().require_request_auth(),
        builder().with_jwt(jwt()).with_origins(strip),
        builder()
            .with_origins(Origins::selam().with_relative_uri_origin("https://api.selamgpt.com").unwrap()),
    ] {
        let layer = layer.build().unwrap();
        for uri in [MODELS, "http://api.selamgpt.com/", "https://evil.com/?token=x", "/v1/models"] {
            for choice in &choices {
                let mut request = get(uri);
                bring_theirs(&mut request);
                request.headers_mut().insert("connection", "x-api-key, close".parse().unwrap());
                request.headers_mut().insert("accept", "text/plain".parse().unwrap());
                if let Some(choice) = choice {
                    request.extensions_mut().insert(choice.clone());
                }
                let mut ours = head(request.clone());
                let brought = ours.headers.clone();
                match (layer.authorize(&mut ours).await, send(&layer, request).await) {
                    (Ok(authorized), Ok(sent)) => {
                        assert_eq!((&ours.uri, &ours.headers), (sent.uri(), sent.headers()));
                        for (name, value) in authorized.headers() {
                            let first = sent.headers().get(name);
                            assert_eq!(value, first);
                            let is_theirs = value == brought.get(name);
                            assert!(is_theirs || value.is_none_or(HeaderValue::is_sensitive));
                        }
                    }
                    (Err(ours_error), Err(error)) => {
                        assert_eq!(ours_error.to_string(), error.to_string());
                        assert_eq!(ours.headers, brought, "a refused head keeps its headers");
                        refused += 1;
                    }
                    (ours, layers) => panic!("{ours:?} differs from {layers:?}"),
                }
            }
        }
    }
    assert!(refused > 50, "{refused}");
}

/// H2: the list for other header types has sensitive values, and says what to remove.
#[tokio::test]
async fn headers_are_listed_for_other_hosts() {
    let listed = async |layer: &SelamLayer| {
        let mut head = head(get(MODELS));
        let authorized = layer.authorize(&mut head).await.unwrap();
        let values = authorized.headers().map(|(name, value)| {
            assert!(value.is_none_or(HeaderValue::is_sensitive));
            (name.to_string(), value.map(|value| value.to_str().unwrap().to_owned()))
        });
        let printed = format!("{authorized:?} {authorized:#?}");
        assert!(!printed.contains(KEY) && !printed.contains(JWT), "{printed}");
        values
    };
    let pair = |name: &str, value: Option<&str>| (name.to_owned(), value.map(str::to_owned));
    let layer = SelamLayer::builder().with_api_key(key());
    assert_eq!(
        listed(&layer.clone().build().unwrap()).await,
        [pair("authorization", Some(&format!("Bearer {KEY}"))), pair("x-api-key", None)]
    );
    assert_eq!(
        listed(&layer.with_jwt(jwt()).build().unwrap()).await,
        [pair("authorization", Some(&format!("Bearer {JWT}"))), pair("x-api-key", Some(KEY))]
    );
}

/// H4: the handshake's credentials go into its query.
#[tokio::test]
async fn handshake_is_authorized() {
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(jwt()).build().unwrap();
    let mut head = head(handshake("wss://api.selamgpt.com/socket.io/?EIO=4&transport=websocket"));
    let authorized = layer.authorize(&mut head).await.unwrap();
    assert_eq!(head.uri.query(), Some(&*format!("EIO=4&transport=websocket&token={JWT}&api_key={KEY}")));
    assert!(authorized.headers().iter().all(|(_, value)| value.is_none()));
}

/// R7: what is written was valid after the wait, although the JWT expired while the key was awaited.
#[tokio::test(start_paused = true)]
async fn credentials_are_valid_after_the_wait() {
    let (jwts, _) = engine(&Mint::default());
    jwts.prefetch().await.unwrap();
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        sleep(10 * SECOND).await;
        Ok::<_, BoxError>(key())
    }));
    let layer = SelamLayer::builder().with_api_key(keys).with_jwt(&jwts).build().unwrap();
    advance(53 * SECOND).await;
    let mut head = head(get(MODELS));
    layer.authorize(&mut head).await.unwrap();
    assert_eq!((bearer(&head), head.headers["x-api-key"].as_bytes()), ("token-2", KEY.as_bytes()));
}

/// R7: `prefetch` waits for the JWT as well if it expired while the key was awaited.
#[tokio::test(start_paused = true)]
async fn prefetched_credentials_are_valid() {
    let (jwts, _) = engine(&Mint::default());
    jwts.prefetch().await.unwrap();
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        sleep(10 * SECOND).await;
        Ok::<_, BoxError>(key())
    }));
    let layer = SelamLayer::builder().with_api_key(keys).with_jwt(&jwts).build().unwrap();
    advance(53 * SECOND).await;
    layer.prefetch().await.unwrap();
    assert_eq!(jwts.current().unwrap().expose_secret(), "token-2");
}

/// T3, F3: a caller that stops waiting loses nothing, and its head is whole.
#[tokio::test(start_paused = true)]
async fn cancelled_authorization_leaves_the_head() {
    let (jwts, fetches) = counting();
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let mut head = head(get(MODELS));
    head.headers.insert("accept", "text/plain".parse().unwrap());
    let mut waiting = task::spawn(layer.authorize(&mut head));
    assert_pending!(waiting.poll());
    settle().await;
    assert_pending!(waiting.poll());
    drop(waiting);
    assert_eq!((head.uri.to_string(), head.headers.len()), (MODELS.to_owned(), 1));
    sleep(SECOND).await;
    let mut waiting = task::spawn(layer.authorize(&mut head));
    assert!(waiting.poll().is_ready(), "the refresh has continued");
    drop(waiting);
    assert_eq!((bearer(&head), fetches.load(SeqCst)), ("token-1", 1));
}

/// J4, J6: a rejected key is read again, and the request is replayed with the next one, once.
#[tokio::test(start_paused = true)]
async fn rejected_key_is_replayed_once() {
    let layer = SelamLayer::builder().with_api_key(rotating_keys()).build().unwrap();
    let mut head = head(get(MODELS));
    let mut authorized = layer.authorize(&mut head).await.unwrap();
    assert_eq!(bearer(&head), "sk-selam-1");
    assert_eq!(answer(&mut authorized, StatusCode::CONTINUE, "").await, Ok(false));
    assert_eq!(answer(&mut authorized, UNAUTHORIZED, INVALID_KEY).await, Ok(true));
    authorized.authorize_again(&mut head).await.unwrap();
    assert_eq!(bearer(&head), "sk-selam-2");
    // The host sends it again because a connection broke.
    authorized.authorize_again(&mut head).await.unwrap();
    for _ in 0..3 {
        let second = answer(&mut authorized, UNAUTHORIZED, INVALID_KEY).await;
        assert_eq!(second, Err(AuthErrorKind::InvalidApiKey));
    }
}

/// J4: a rejected replay says nothing about the credential, however late it is rejected.
#[tokio::test(start_paused = true)]
async fn rejected_replay_refreshes_nothing() {
    let layer = SelamLayer::builder().with_api_key(rotating_keys()).build().unwrap();
    let mut head = head(get(MODELS));
    let mut authorized = layer.authorize(&mut head).await.unwrap();
    assert_eq!(answer(&mut authorized, UNAUTHORIZED, "").await, Ok(true));
    authorized.authorize_again(&mut head).await.unwrap();
    // The spacing of rejections is over.
    advance(10 * MINUTE).await;
    assert!(answer(&mut authorized, UNAUTHORIZED, "").await.is_err());
    layer.authorize(&mut head).await.unwrap();
    assert_eq!(bearer(&head), "sk-selam-2");
}

/// J1: after a broken connection, a 401 blames what was sent last.
#[tokio::test(start_paused = true)]
async fn resent_request_blames_its_own_token() {
    let (jwts, _) = engine(&Mint::default());
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let mut head = head(get(MODELS));
    let mut authorized = layer.authorize(&mut head).await.unwrap();
    advance(MINUTE).await;
    authorized.authorize_again(&mut head).await.unwrap();
    assert_eq!(bearer(&head), "token-2");
    assert_eq!(authorized.headers()[0].1, Some(&head.headers["authorization"]));
    assert_eq!(answer(&mut authorized, UNAUTHORIZED, "").await, Ok(true));
    authorized.authorize_again(&mut head).await.unwrap();
    assert_eq!(bearer(&head), "token-3");
}

/// J6, J11: the body decides which credential is blamed; without one, it is the JWT.
#[tokio::test(start_paused = true)]
async fn body_decides_what_is_blamed() {
    const MISSING_SCOPE: &str = r#"{"error":{"code":"insufficient_scope"}}"#;
    const MISSING_KEY: &str = r#"{"error":{"code":"missing_api_key"}}"#;
    for (status, body, expected) in [
        (UNAUTHORIZED, INVALID_KEY, Some(["token-1", "sk-selam-2"])),
        (UNAUTHORIZED, INVALID_TOKEN, Some(["token-2", "sk-selam-1"])),
        (UNAUTHORIZED, "", Some(["token-2", "sk-selam-1"])),
        (UNAUTHORIZED, MISSING_SCOPE, None),
        (UNAUTHORIZED, MISSING_KEY, None),
        (StatusCode::FORBIDDEN, "", None),
    ] {
        let (jwts, fetches) = counting();
        let layer = SelamLayer::builder().with_api_key(rotating_keys()).with_jwt(&jwts).build().unwrap();
        let mut head = head(get(MODELS));
        let mut authorized = layer.authorize(&mut head).await.unwrap();
        let replays = answer(&mut authorized, status, body).await;
        assert_eq!(replays.is_ok(), expected.is_some(), "{body}");
        authorized.authorize_again(&mut head).await.unwrap();
        let sent = [bearer(&head), head.headers["x-api-key"].to_str().unwrap()];
        assert_eq!(sent, expected.unwrap_or(["token-1", "sk-selam-1"]), "{body}");
        assert!(expected.is_some() || fetches.load(SeqCst) == 1);
    }
}

/// J1: a late 401 for an older token is replayed at once with the newer one.
#[tokio::test(start_paused = true)]
async fn late_401_replays_with_the_newer_token() {
    let (jwts, fetches) = counting();
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let mut head = head(get(MODELS));
    let mut late = layer.authorize(&mut head).await.unwrap();
    let mut first = layer.authorize(&mut head).await.unwrap();
    assert_eq!(answer(&mut first, UNAUTHORIZED, INVALID_TOKEN).await, Ok(true));
    let started = Instant::now();
    assert_eq!(answer(&mut late, UNAUTHORIZED, INVALID_TOKEN).await, Ok(true));
    late.authorize_again(&mut head).await.unwrap();
    assert_eq!((bearer(&head), fetches.load(SeqCst)), ("token-2", 2));
    assert_eq!(started.elapsed(), Duration::ZERO);
}

/// J5, J10: an endpoint that rejects everybody costs two fetches, for any number of requests.
#[tokio::test(start_paused = true)]
async fn rejections_are_spaced() {
    for script in [Answer::Lives(MINUTE), Answer::Same("token-1", MINUTE)] {
        let mint = Mint::default().then(Answer::Lives(MINUTE)).then_always(script);
        let (jwts, _) = engine(&mint);
        let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
        let mut head = head(get(MODELS));
        for _ in 0..50 {
            let mut authorized = layer.authorize(&mut head).await.unwrap();
            while answer(&mut authorized, UNAUTHORIZED, "").await == Ok(true) {
                authorized.authorize_again(&mut head).await.unwrap();
            }
        }
        assert_eq!(mint.asked(), 2);
    }
}

/// J5: an accepted replay ends the spacing; any other answer says nothing about the credential.
#[tokio::test(start_paused = true)]
async fn accepted_replay_ends_the_spacing() {
    for (second, is_spaced) in [(200, false), (101, false), (429, true), (503, true), (403, true)] {
        let (jwts, _) = counting();
        let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
        let mut head = head(get(MODELS));
        let mut authorized = layer.authorize(&mut head).await.unwrap();
        assert_eq!(answer(&mut authorized, UNAUTHORIZED, "").await, Ok(true));
        authorized.authorize_again(&mut head).await.unwrap();
        // Some hosts say so at each answer.
        authorized.forbid_replay();
        let second = StatusCode::from_u16(second).unwrap();
        assert_ne!(answer(&mut authorized, second, "").await, Ok(true));

        let mut next = layer.authorize(&mut head).await.unwrap();
        let replays = answer(&mut next, UNAUTHORIZED, "").await == Ok(true);
        assert_eq!(replays, !is_spaced, "{second}");
    }
}

/// J7: without a replay, a 401 refreshes for the next request and is not waited for.
#[tokio::test(start_paused = true)]
async fn forbidden_replay_refreshes_all_the_same() {
    let (jwts, fetches) = counting();
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let mut head = head(get(MODELS));
    let mut authorized = layer.authorize(&mut head).await.unwrap();
    authorized.forbid_replay();
    let started = Instant::now();
    assert_eq!(answer(&mut authorized, UNAUTHORIZED, "").await, Err(AuthErrorKind::Unauthorized));
    assert_eq!(started.elapsed(), Duration::ZERO);
    layer.authorize(&mut head).await.unwrap();
    assert_eq!((bearer(&head), fetches.load(SeqCst)), ("token-2", 2));
}

/// T3: a caller that stops waiting for the refresh gets no replay, and the refresh continues.
#[tokio::test(start_paused = true)]
async fn cancelled_report_is_no_replay() {
    let (jwts, fetches) = counting();
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(&jwts).build().unwrap();
    let mut head = head(get(MODELS));
    let mut authorized = layer.authorize(&mut head).await.unwrap();
    let mut waiting = task::spawn(answer(&mut authorized, UNAUTHORIZED, ""));
    assert_pending!(waiting.poll());
    drop(waiting);
    sleep(SECOND).await;
    assert_eq!((fetches.load(SeqCst), jwts.current().unwrap().expose_secret()), (2, "token-2"));
    assert!(answer(&mut authorized, UNAUTHORIZED, "").await.is_err());
}

/// S2, E4: the error shows neither the credentials that were sent nor more of the body than the limit.
#[tokio::test]
async fn error_is_masked_and_bounded() {
    let layer = SelamLayer::builder().with_api_key(key()).with_error_body_limit(100).build().unwrap();
    let mut authorized = layer.authorize(&mut head(get(MODELS))).await.unwrap();
    let echo =
        format!(r#"{{"error":{{"message":"{KEY} is gone","code":"invalid_api_key"}}}}{}"#, "x".repeat(99));
    let error = authorized.should_replay(UNAUTHORIZED, &HeaderMap::new(), echo.as_bytes()).await.unwrap_err();
    assert_eq!((error.kind(), error.body().len() <= 100), (AuthErrorKind::InvalidApiKey, true));
    let shown = format!("{error} {error:#?} {}", String::from_utf8_lossy(error.body()));
    assert!(!shown.contains(&KEY[..20]), "{shown}");
    assert!(error.message().unwrap().contains("is gone"));
}

/// H4: each subject's request carries that subject's JWT; `prefetch` fetches none.
#[tokio::test]
async fn subjects_have_their_own_jwts() {
    let jwts = PerSubject::new(|subject: &Subject| {
        let token = Token::new(format!("jwt-of-{}", subject.as_str()));
        source_fn(move |_: Reason<Token>| std::future::ready(token.clone()))
    });
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(jwts).build().unwrap();
    layer.prefetch().await.unwrap();
    for subject in ["user-1", "user-2"] {
        let mut head = head(get(MODELS));
        head.extensions.insert(Subject::new(subject));
        layer.authorize(&mut head).await.unwrap();
        assert_eq!(bearer(&head), format!("jwt-of-{subject}"));
    }
    let error = layer.authorize(&mut head(get(MODELS))).await.unwrap_err();
    assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
}

/// W1, W3: ready while a valid credential is left, and not ready without one.
#[tokio::test(start_paused = true)]
async fn readiness_follows_the_credentials() {
    let simulator = Simulator::new();
    let key = ApiKey::new(simulator.issue_key()).unwrap();
    let endpoint = TokenEndpoint::new::<_, Body, _>("https://login.example/oauth/token", simulator.clone());
    let auth = ClientAuth::api_key(key.clone());
    let jwts = Refreshing::new(OAuthSource::client_credentials(endpoint.unwrap().with_client_auth(auth)));
    let layer = SelamLayer::builder().with_api_key(key).with_jwt(jwts).build().unwrap();
    let probe = async || layer.prefetch().await.map_err(|error| error.kind());

    simulator.set_token_lifetime(MINUTE);
    simulator.set_token_outage(true);
    assert_eq!(probe().await, Err(AuthErrorKind::RefreshFailed));
    let asked = simulator.token_requests();
    for _ in 0..10 {
        assert_eq!(probe().await, Err(AuthErrorKind::RefreshFailed));
    }
    assert_eq!(simulator.token_requests(), asked, "the back-off holds for probes");

    simulator.set_token_outage(false);
    sleep(2 * SECOND).await;
    assert_eq!(probe().await, Ok(()));
    simulator.set_token_outage(true);
    sleep(58 * SECOND).await;
    assert_eq!(probe().await, Ok(()), "a valid JWT is left");
    sleep(3 * SECOND).await;
    assert_eq!(probe().await, Err(AuthErrorKind::RefreshFailed));
    assert_eq!(simulator.requests(), simulator.token_requests(), "the API is not called");
}

/// R1: key and JWT are fetched at the same time.
#[tokio::test(start_paused = true)]
async fn prefetch_fetches_both_at_once() {
    let (jwts, _) = engine(&Mint::default().taking(2 * SECOND));
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        sleep(2 * SECOND).await;
        Ok::<_, BoxError>(Fetched::new(key()))
    }));
    let layer = SelamLayer::builder().with_api_key(&keys).with_jwt(&jwts).build().unwrap();
    let started = Instant::now();
    layer.prefetch().await.unwrap();
    assert_eq!(started.elapsed(), 2 * SECOND);
    assert!(keys.current().is_some() && jwts.current().is_some());
}
