//! Stacks that share the JWTs of their token endpoint, and what makes two requests to it the same.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tower::{BoxError, Layer, ServiceExt};
use tower_selam::{
    ApiKey, SelamLayer, SelamLayerBuilder, Subject, Token,
    fleet::{Fleet, MemoryStore, SealingKey},
    oauth::{ClientAuth, OAuthSource, SubjectTokens, TokenEndpoint, TokenType},
    simulator::Simulator,
    source::Source,
};

use crate::support::{JWT, key};

const URL: &str = "https://api.selamgpt.com/oauth/token";
const CHAT: &str = "https://api.selamgpt.com/v1/chat/completions";
const SELAM: &str = r#"{"messages":[{"role":"user","content":"Selam!"}]}"#;

fn fleet(store: &MemoryStore) -> Fleet {
    Fleet::new("billing", store.clone(), SealingKey::new([7; 32])).unwrap()
}

fn builder(simulator: &Simulator, fleet: &Fleet) -> SelamLayerBuilder {
    SelamLayer::builder()
        .with_api_key(ApiKey::new(simulator.issue_key()).unwrap())
        .with_token_client::<_, Full<Bytes>, _>(simulator.clone())
        .with_token_url(URL)
        .with_fleet(fleet.clone())
}

/// Sends a request for `subject`, and returns the JWT that it carried.
async fn send(simulator: &Simulator, layer: &SelamLayer, subject: &Subject) -> Result<String, BoxError> {
    let request = Request::post(CHAT).extension(subject.clone()).body(Full::<Bytes>::from(SELAM))?;
    let response = layer.layer(simulator.clone()).oneshot(request).await?;
    assert_eq!(response.status(), 200);
    Ok(simulator.received().last().unwrap().headers["authorization"].to_str()?.to_owned())
}

/// N1: the endpoint is asked once for all stacks that ask for the same.
#[tokio::test]
async fn stacks_share_the_jwt_of_the_service() {
    let (simulator, store) = (Simulator::new(), MemoryStore::default());
    let [first, second, other] = [(); 3].map(|()| fleet(&store));
    for fleet in [&first, &second] {
        builder(&simulator, fleet).build_with_env().unwrap().prefetch().await.unwrap();
    }
    assert_eq!(simulator.token_requests(), 1);
    let shared = second.status("service").await.unwrap().unwrap();
    let scoped = builder(&simulator, &other).with_token_scope("chat").build_with_env().unwrap();
    scoped.prefetch().await.unwrap();
    assert_eq!(simulator.token_requests(), 2);
    assert_ne!(other.status("service").await.unwrap().unwrap().token, shared.token);
}

/// N1
#[tokio::test]
async fn fixed_jwts_are_not_shared() {
    let (simulator, store) = (Simulator::new(), MemoryStore::default());
    let fleet = fleet(&store);
    let layer = SelamLayer::builder().with_api_key(key()).with_jwt(Token::new(JWT).unwrap());
    let layer = layer.with_fleet(fleet.clone()).build_with_env().unwrap();
    let request = Request::post(CHAT).body(Full::<Bytes>::from(SELAM)).unwrap();
    layer.layer(simulator).oneshot(request).await.unwrap_err();
    assert_eq!(fleet.status("service").await.unwrap(), None);
}

/// N1, H5: a user's JWT is used where the user has presented a token, and keeps to the user.
#[tokio::test]
async fn stacks_share_the_jwts_of_users() {
    let (simulator, store) = (Simulator::new(), MemoryStore::default());
    let (own, ada, bo) = (Subject::new("proxy"), Subject::new("ada"), Subject::new("bo"));
    let stack = || {
        let tokens = SubjectTokens::new().with_own_subject(own.clone());
        let layer = builder(&simulator, &fleet(&store)).with_subject_tokens(tokens.clone());
        (layer.build_with_env().unwrap(), tokens)
    };
    let [(here, presented_here), (there, presented_there)] = [stack(), stack()];
    presented_here.present(&ada, &Token::new("verified.jwt.of-ada").unwrap());
    let of_ada = send(&simulator, &here, &ada).await.unwrap();
    assert_eq!(simulator.token_requests(), 1);

    // She has presented nothing there, which is no failure of the fleet's.
    send(&simulator, &there, &ada).await.unwrap_err();
    presented_there.present(&bo, &Token::new("verified.jwt.of-bo").unwrap());
    assert_ne!(send(&simulator, &there, &bo).await.unwrap(), of_ada);
    assert_eq!(simulator.token_requests(), 2);
    for user in ["user:ada", "user:bo"] {
        assert_eq!(fleet(&store).status(user).await.unwrap().unwrap().failure, None);
    }

    let (again, presented) = stack();
    presented.present(&ada, &Token::new("verified.jwt.of-ada.2").unwrap());
    assert_eq!(send(&simulator, &again, &ada).await.unwrap(), of_ada);
    for layer in [&here, &there, &again] {
        send(&simulator, layer, &own).await.unwrap();
    }
    assert_eq!(simulator.token_requests(), 3);
    assert!(fleet(&store).status("service").await.unwrap().is_some());
}

fn endpoint(url: &str) -> TokenEndpoint {
    TokenEndpoint::new::<_, Full<Bytes>, _>(url, Simulator::new()).unwrap()
}

fn identity(source: &OAuthSource) -> String {
    source.identity().unwrap()
}

/// N1: members of different versions have to agree on it.
#[test]
fn the_identity_of_a_request_never_changes() {
    let auth = ClientAuth::client_secret_basic("my-service", "s3cr3t").unwrap();
    let source = OAuthSource::client_credentials(endpoint(URL).with_client_auth(auth));
    let source = source.with_audience("b").with_audience("a").with_scope("chat voice");
    assert_eq!(
        identity(&source.with_parameter("password", "s3cr3t").unwrap()),
        "audience=a&audience=b&client_id=my-service\
         &endpoint=https%3A%2F%2Fapi.selamgpt.com%2Foauth%2Ftoken%3F\
         &grant_type=client_credentials&password=4e738ca5563c06cf&scope=chat+voice"
    );
}

/// N1: neither the order of calls, nor what proves the client's identity, nor the subject's token makes a difference.
#[test]
fn the_same_request_has_the_same_identity() {
    let client = |auth| OAuthSource::client_credentials(endpoint(URL).with_client_auth(auth));
    let scoped = |source: OAuthSource| identity(&source.with_scope("a").with_resource("urn:x"));
    let base = scoped(client(ClientAuth::client_secret_basic("id", "old").unwrap()));
    assert_eq!(scoped(client(ClientAuth::client_secret_post("id", "new").unwrap())), base);
    let reordered = client(ClientAuth::public("id").unwrap()).with_resource("urn:x").with_scope("a");
    assert_eq!(identity(&reordered), base);

    let of_key = |key: &str| identity(&client(ClientAuth::api_key(ApiKey::new(key).unwrap())));
    assert_eq!(of_key("sk-selam-a"), of_key("sk-selam-b"));
    let of_token = |token: &str| {
        let token = Token::new(token).unwrap();
        identity(&OAuthSource::token_exchange(endpoint(URL), token, TokenType::Jwt))
    };
    assert_eq!(of_token("a.b.c"), of_token("d.e.f"));
}

/// N1, S2
#[test]
fn each_part_of_a_request_is_in_its_identity() {
    let plain = || endpoint(URL);
    let credentials = || OAuthSource::client_credentials(plain());
    let with_auth = |auth| OAuthSource::client_credentials(plain().with_client_auth(auth));
    let exchange = |kind| OAuthSource::token_exchange(plain(), Token::new("a.b.c").unwrap(), kind);
    let sources = [
        credentials(),
        OAuthSource::client_credentials(endpoint("https://api.selamgpt.com/oauth/token2")),
        OAuthSource::client_credentials(endpoint("https://api.selamgpt.com/oauth/token?key=s3cr3t")),
        OAuthSource::client_credentials(endpoint("https://login.example/oauth/token")),
        with_auth(ClientAuth::public("a").unwrap()),
        with_auth(ClientAuth::public("b").unwrap()),
        with_auth(ClientAuth::api_key(key())),
        OAuthSource::jwt_bearer(plain(), Token::new("a.b.c").unwrap()),
        exchange(TokenType::Jwt),
        exchange(TokenType::IdToken),
        exchange(TokenType::Jwt).with_actor(Token::new("a.b.c").unwrap(), TokenType::Jwt),
        credentials().with_scope("chat"),
        credentials().with_scope("voice"),
        credentials().with_audience("chat"),
        credentials().with_audience("chat").with_audience("voice"),
        credentials().with_resource("chat"),
        credentials().with_parameter("password", "s3cr3t").unwrap(),
        credentials().with_parameter("password", "s3cr3ts").unwrap(),
        credentials().with_parameter("pass", "s3cr3t").unwrap(),
        credentials().with_scope("a&scope=b"),
    ];
    let mut identities: Vec<_> = sources.iter().map(identity).collect();
    for identity in &identities {
        assert!(!identity.contains("s3cr3t") && !identity.contains("a.b.c"), "{identity}");
    }
    let count = identities.len();
    identities.sort();
    identities.dedup();
    assert_eq!(identities.len(), count);
}
