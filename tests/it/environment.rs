//! Configuration from environment variables, which are process-wide: each case runs in a process of its own.

use std::{
    env,
    process::Command,
    sync::{Arc, Mutex},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{Request, Response};
use http_body_util::BodyExt;
use tower::{BoxError, ServiceExt, service_fn};
use tower_selam::{ApiKey, BaseUrl, ConfigError, SelamLayer, Token, oauth::ClientAuth, simulator::Simulator};

use crate::files::{Directory, write_old};
use crate::support::{Body, MODELS, get, send, values};

pub(crate) const CASE: &str = "TOWER_SELAM_TEST_CASE";

/// Runs the test `name` in a new process with these variables, and returns what it passes to [`tell`].
#[track_caller]
pub(crate) fn run(name: &str, case: &str, variables: &[(&str, &str)]) -> String {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env_remove("SELAM_API_KEY")
        .env_remove("SELAM_API_KEY_FILE")
        .env_remove("SELAM_JWT")
        .env_remove("SELAM_JWT_FILE")
        .env_remove("SELAM_TOKEN_URL")
        .env_remove("SELAM_CLIENT_ID")
        .env_remove("SELAM_CLIENT_SECRET")
        .env_remove("SELAM_CLIENT_SECRET_FILE")
        .env_remove("SELAM_CLIENT_AUTH")
        .env_remove("SELAM_TOKEN_SCOPE")
        .env_remove("SELAM_TOKEN_AUDIENCE")
        .env_remove("SELAM_TOKEN_RESOURCE")
        .env_remove("SELAM_BASE_URL")
        .envs(variables.iter().copied())
        .env(CASE, case)
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    printed.lines().find_map(|line| line.split_once("=> ")).expect("a result").1.to_owned()
}

#[allow(clippy::print_stdout, reason = "the other process answers on stdout")]
pub(crate) fn tell(answer: &str) {
    println!("\n=> {answer}");
}

fn describe<T>(result: Result<T, ConfigError>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(error) => format!("{error} ({:?})", error.env_var()),
    }
}

/// S1: the error names the variable and does not show its value.
#[test]
fn invalid_variable_is_named_and_not_shown() {
    if let Ok(case) = env::var(CASE) {
        return tell(&match &*case {
            "key" => describe(ApiKey::from_env()),
            "jwt" => describe(Token::from_env()),
            "url" => describe(BaseUrl::from_env()),
            "other" => describe(ApiKey::from_env_var("OTHER_KEY")),
            _ => describe(SelamLayer::from_env()),
        });
    }
    let run = |case, variables: &[(&str, &str)]| {
        run("environment::invalid_variable_is_named_and_not_shown", case, variables)
    };
    let key = r#"(Some("SELAM_API_KEY"))"#;
    for (case, variables, expected) in [
        ("key", &[][..], format!("API key from the environment variable SELAM_API_KEY is not set {key}")),
        ("key", &[("SELAM_API_KEY", " ")], format!("API key from the environment variable SELAM_API_KEY is empty {key}")),
        (
            "key",
            &[("SELAM_API_KEY", "secret secret")],
            format!("API key from the environment variable SELAM_API_KEY has white space at byte 6 {key}"),
        ),
        ("key", &[("SELAM_API_KEY", "sk-selam-a\n")], "ok".to_owned()),
        (
            "jwt",
            &[("SELAM_JWT", "Bearer secret")],
            r#"JWT from the environment variable SELAM_JWT starts with `Bearer `: remove that prefix (Some("SELAM_JWT"))"#
                .to_owned(),
        ),
        (
            "key",
            &[("SELAM_API_KEY", "eyJhbGciOiJIUzI1NiJ9.e30.c2VjcmV0")],
            format!(
                "API key from the environment variable SELAM_API_KEY is a JWT: set it as the JWT, and a key that begins \
                 with `sk-selam-` as the API key {key}"
            ),
        ),
        (
            "jwt",
            &[("SELAM_JWT", "sk-selam-secret")],
            r#"JWT from the environment variable SELAM_JWT is an API key: set it as the API key, or leave the JWT out if you have none (Some("SELAM_JWT"))"#
                .to_owned(),
        ),
        (
            "url",
            &[("SELAM_BASE_URL", "http://secret.example/v1")],
            r#"base URL from the environment variable SELAM_BASE_URL is not https (Some("SELAM_BASE_URL"))"#.to_owned(),
        ),
        ("url", &[], "ok".to_owned()),
        (
            "other",
            &[("OTHER_KEY", "\"secret\"")],
            r#"API key from the environment variable OTHER_KEY is in quotes: remove them (Some("OTHER_KEY"))"#
                .to_owned(),
        ),
        ("selam", &[], format!("API key from the environment variable SELAM_API_KEY is not set {key}")),
        ("selam", &[("SELAM_API_KEY", "sk-selam-a")], "ok".to_owned()),
        // Empty counts as not set.
        ("key", &[("SELAM_API_KEY", "")], format!("API key from the environment variable SELAM_API_KEY is not set {key}")),
        ("url", &[("SELAM_BASE_URL", "")], "ok".to_owned()),
        (
            "selam",
            &[
                ("SELAM_API_KEY", "sk-selam-a"),
                ("SELAM_API_KEY_FILE", ""),
                ("SELAM_JWT", ""),
                ("SELAM_JWT_FILE", ""),
                ("SELAM_TOKEN_URL", ""),
                ("SELAM_CLIENT_ID", ""),
                ("SELAM_CLIENT_SECRET", ""),
                ("SELAM_BASE_URL", ""),
            ],
            "ok".to_owned(),
        ),
        (
            "selam",
            &[("SELAM_API_KEY", "sk-selam-a"), ("SELAM_JWT", " ")],
            r#"JWT from the environment variable SELAM_JWT is empty (Some("SELAM_JWT"))"#.to_owned(),
        ),
        (
            "selam",
            &[("SELAM_API_KEY", "sk-selam-a"), ("SELAM_BASE_URL", "https://secret@h")],
            r#"base URL from the environment variable SELAM_BASE_URL has a user name or password in it (Some("SELAM_BASE_URL"))"#
                .to_owned(),
        ),
    ] {
        let answer = run(case, variables);
        assert_eq!(answer, expected, "{case} {variables:?}");
        assert!(!answer.contains("secret"));
    }
}

/// S1: `VarError` would show the value.
#[cfg(unix)]
#[test]
fn non_unicode_variable_is_not_shown() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    if env::var(CASE).is_ok() {
        let error = ApiKey::from_env().unwrap_err();
        return tell(&format!("{error} {error:?}"));
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "environment::non_unicode_variable_is_not_shown", "--nocapture"])
        .env("SELAM_API_KEY", OsStr::from_bytes(b"secret\xff"))
        .env(CASE, "key")
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("SELAM_API_KEY is not valid Unicode"), "{printed}");
    assert!(!printed.contains("secret"), "{printed}");
}

/// A variable that is not needed is not read, even if it is invalid.
#[test]
fn explicit_argument_overrides_the_environment() {
    const NAME: &str = "environment::explicit_argument_overrides_the_environment";
    if let Ok(case) = env::var(CASE) {
        let mut builder = SelamLayer::builder();
        if case == "explicit" {
            builder = builder
                .with_api_key(ApiKey::new("sk-selam-explicit").unwrap())
                .with_jwt(Token::new("explicit.j.wt").unwrap())
                .with_base_url(BaseUrl::default());
        }
        let layer = builder.build_with_env().unwrap();
        let uri = layer.base_url().endpoint("models").unwrap().to_string();
        let sent = tokio_test::block_on(send(&layer, get(&uri))).unwrap();
        let headers = (values(&sent, "authorization"), values(&sent, "x-api-key"));
        return tell(&format!("{uri} {headers:?}"));
    }
    let environment = [
        ("SELAM_API_KEY", "sk-selam-environment"),
        ("SELAM_JWT", "environment.j.wt"),
        ("SELAM_BASE_URL", "https://gateway.example/v1"),
    ];
    assert_eq!(
        run(NAME, "environment", &environment),
        r#"https://gateway.example/v1/models (["Bearer environment.j.wt"], ["sk-selam-environment"])"#
    );
    assert_eq!(
        run(NAME, "environment", &environment[..1]),
        format!(r#"{MODELS} (["Bearer sk-selam-environment"], [])"#)
    );
    // Variables that are not needed may be invalid.
    for environment in [&environment[..], &[("SELAM_API_KEY", ""), ("SELAM_BASE_URL", "nowhere")]] {
        assert_eq!(
            run(NAME, "explicit", environment),
            format!(r#"{MODELS} (["Bearer explicit.j.wt"], ["sk-selam-explicit"])"#)
        );
    }
}

/// `SELAM_TOKEN_URL`, `SELAM_CLIENT_ID` and `SELAM_CLIENT_SECRET`.
#[test]
fn token_endpoint_is_read_from_the_environment() {
    const NAME: &str = "environment::token_endpoint_is_read_from_the_environment";
    if let Ok(case) = env::var(CASE) {
        let simulator = Simulator::new();
        let (id, secret) = simulator.issue_client();
        let key = simulator.issue_key();
        let client = service_fn({
            let simulator = simulator.clone();
            move |mut request: Request<Body>| {
                let authorization = request.headers()["authorization"].to_str().unwrap().to_owned();
                assert_eq!(request.uri(), "https://login.example/oauth/token");
                if authorization.starts_with("Basic ") {
                    assert_eq!(authorization, format!("Basic {}", BASE64_STANDARD.encode("app:s%3Acret")));
                    let known = format!(
                        "{id}:{}",
                        form_urlencoded::byte_serialize(secret.as_bytes()).collect::<String>()
                    );
                    let known = format!("Basic {}", BASE64_STANDARD.encode(known)).parse().unwrap();
                    request.headers_mut().insert("authorization", known);
                }
                simulator.clone().oneshot(request)
            }
        });
        let mut builder = SelamLayer::builder().with_api_key(ApiKey::new(&*key).unwrap());
        if case != "no client" {
            builder = builder.with_token_client(client);
        }
        if let Some(url) = case.strip_prefix("given ") {
            assert!(!format!("{:?}", builder.clone().with_token_url(url)).contains("login"));
            builder = builder.with_token_url(url);
        }
        let layer = match builder.build_with_env() {
            Ok(layer) => layer,
            Err(error) => return tell(&describe(Err::<(), _>(error))),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let sent = runtime.block_on(send(&layer, get(MODELS))).unwrap();
        let jwt = values(&sent, "authorization")[0].strip_prefix("Bearer ").unwrap().to_owned();
        let authorization = simulator.received()[0].headers["authorization"].to_str().unwrap().to_owned();
        let scheme = if authorization == format!("Bearer {key}") { "key" } else { "client" };
        let ours = values(&sent, "x-api-key") == [key] && Token::new(jwt).unwrap().expires_at().is_some();
        return tell(&format!("{scheme} {ours}"));
    }
    let url = ("SELAM_TOKEN_URL", "https://login.example/oauth/token");
    let (id, secret) = (("SELAM_CLIENT_ID", "app"), ("SELAM_CLIENT_SECRET", "s:cret\n"));
    for (case, variables, expected) in [
        ("", &[url][..], "key true"),
        ("", &[url, id, secret], "client true"),
        // A URL given by the program takes precedence.
        (
            "given https://login.example/oauth/token",
            &[("SELAM_TOKEN_URL", "nonsense"), ("SELAM_JWT", "")],
            "key true",
        ),
        ("given https://login.example/oauth/token", &[id, secret], "client true"),
        ("given http://login.example/oauth/token", &[url], "token endpoint's URL is not https (None)"),
        (
            "",
            &[url, id],
            r#"client secret from the environment variable SELAM_CLIENT_SECRET is not set (Some("SELAM_CLIENT_SECRET"))"#,
        ),
        (
            "",
            &[url, secret],
            r#"client id from the environment variable SELAM_CLIENT_ID is not set (Some("SELAM_CLIENT_ID"))"#,
        ),
        (
            "",
            &[url, id, ("SELAM_CLIENT_SECRET", "")],
            r#"client secret from the environment variable SELAM_CLIENT_SECRET is not set (Some("SELAM_CLIENT_SECRET"))"#,
        ),
        (
            "no client",
            &[url],
            r#"token endpoint's URL from the environment variable SELAM_TOKEN_URL needs an HTTP client: pass one to `SelamLayerBuilder::with_token_client` (Some("SELAM_TOKEN_URL"))"#,
        ),
        (
            "",
            &[("SELAM_TOKEN_URL", "http://login.example/oauth/token")],
            r#"token endpoint's URL from the environment variable SELAM_TOKEN_URL is not https (Some("SELAM_TOKEN_URL"))"#,
        ),
        (
            "",
            &[url, ("SELAM_JWT_FILE", "jwt")],
            r#"JWT from the environment variable SELAM_JWT_FILE is set together with SELAM_TOKEN_URL: set only one of them (Some("SELAM_JWT_FILE"))"#,
        ),
        (
            "",
            &[url, ("SELAM_JWT", "a.b.c")],
            r#"JWT from the environment variable SELAM_JWT is set together with SELAM_TOKEN_URL: set only one of them (Some("SELAM_JWT"))"#,
        ),
    ] {
        assert_eq!(run(NAME, case, variables), expected, "{case} {variables:?}");
    }
}

/// K7: the client's method, its secret's file, and what is requested.
#[test]
fn token_request_is_read_from_the_environment() {
    const NAME: &str = "environment::token_request_is_read_from_the_environment";
    if let Ok(case) = env::var(CASE) {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let client = service_fn({
            let requests = Arc::clone(&requests);
            move |request: Request<Body>| {
                let requests = Arc::clone(&requests);
                async move {
                    let basic = request.headers().contains_key("authorization");
                    let body = request.into_body().collect().await.unwrap().to_bytes();
                    let form = form_urlencoded::parse(&body).skip(1);
                    let form: Vec<_> = form.map(|(name, value)| format!("{name}={value}")).collect();
                    requests.lock().unwrap().push(format!("{basic} {}", form.join("&")));
                    let body = r#"{"access_token":"a","token_type":"Bearer","expires_in":60}"#;
                    Ok::<_, BoxError>(Response::new(Body::from(body)))
                }
            }
        });
        let mut builder = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-a").unwrap());
        builder = builder.with_token_client(client);
        if case == "given" {
            let auth = ClientAuth::client_secret_post("given", "secret").unwrap();
            builder = builder.with_client_auth(auth).with_token_scope("s").with_token_audience("a");
            builder = builder.with_token_resource("r");
        }
        let layer = match builder.build_with_env() {
            Ok(layer) => layer,
            Err(error) => return tell(&describe(Err::<(), _>(error))),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(send(&layer, get(MODELS))).unwrap();
        return tell(&requests.lock().unwrap()[0].clone());
    }
    let directory = Directory::new();
    write_old(&directory.file(), "from a file\n");
    let file = ("SELAM_CLIENT_SECRET_FILE", directory.file().to_str().unwrap().to_owned());
    let file = (file.0, &*file.1);
    let url = ("SELAM_TOKEN_URL", "https://login.example/oauth/token");
    let (id, secret) = (("SELAM_CLIENT_ID", "app"), ("SELAM_CLIENT_SECRET", "s3cr3t"));
    let method = |name| ("SELAM_CLIENT_AUTH", name);
    let scope = ("SELAM_TOKEN_SCOPE", "audio agent\n");
    let audience = ("SELAM_TOKEN_AUDIENCE", "selam");
    let resource = ("SELAM_TOKEN_RESOURCE", "urn:selam:api");
    let error = |text: &str, name: &str| format!("{text} (Some({name:?}))");
    let requests = "token request parameter from the environment variable";
    for (case, variables, expected) in [
        ("", &[url, id, secret][..], "true ".to_owned()),
        ("", &[url, id, secret, method("client_secret_basic")], "true ".to_owned()),
        (
            "",
            &[url, id, secret, method("client_secret_post")],
            "false client_id=app&client_secret=s3cr3t".to_owned(),
        ),
        (
            "",
            &[url, id, file, method("client_secret_post")],
            "false client_id=app&client_secret=from a file".to_owned(),
        ),
        ("", &[url, id, method("none")], "false client_id=app".to_owned()),
        (
            "",
            &[url, scope, audience, resource],
            "true scope=audio agent&audience=selam&resource=urn:selam:api".to_owned(),
        ),
        (
            "given",
            &[url, id, secret, scope, audience, resource, method("nonsense")],
            "false scope=s&audience=a&resource=r&client_id=given&client_secret=secret".to_owned(),
        ),
        // Set to nothing counts as not set.
        (
            "",
            &[
                url,
                ("SELAM_CLIENT_ID", ""),
                ("SELAM_CLIENT_SECRET", ""),
                ("SELAM_CLIENT_SECRET_FILE", ""),
                method(""),
                ("SELAM_TOKEN_SCOPE", ""),
                ("SELAM_TOKEN_AUDIENCE", ""),
                ("SELAM_TOKEN_RESOURCE", ""),
            ],
            "true ".to_owned(),
        ),
        (
            "",
            &[url, id, secret, file],
            error(
                "client secret from the environment variable SELAM_CLIENT_SECRET is set together with SELAM_CLIENT_SECRET_FILE: set only one of them",
                "SELAM_CLIENT_SECRET",
            ),
        ),
        (
            "",
            &[url, id, secret, method("none")],
            error(
                "client secret from the environment variable SELAM_CLIENT_SECRET is set together with SELAM_CLIENT_AUTH=none: set only one of them",
                "SELAM_CLIENT_SECRET",
            ),
        ),
        (
            "",
            &[url, id, secret, method("Client_Secret_Post")],
            error(
                "client authentication method from the environment variable SELAM_CLIENT_AUTH is not client_secret_basic, client_secret_post or none",
                "SELAM_CLIENT_AUTH",
            ),
        ),
        (
            "",
            &[url, method("client_secret_post")],
            error("client id from the environment variable SELAM_CLIENT_ID is not set", "SELAM_CLIENT_ID"),
        ),
        (
            "",
            &[url, file],
            error("client id from the environment variable SELAM_CLIENT_ID is not set", "SELAM_CLIENT_ID"),
        ),
        (
            "",
            &[url, id, method("client_secret_post")],
            error(
                "client secret from the environment variable SELAM_CLIENT_SECRET is not set",
                "SELAM_CLIENT_SECRET",
            ),
        ),
        (
            "",
            &[url, id, ("SELAM_CLIENT_SECRET_FILE", "/no/such/file")],
            "client secret from the file /no/such/file cannot be read: entity not found (None)".to_owned(),
        ),
        (
            "",
            &[url, ("SELAM_TOKEN_SCOPE", "a\nb")],
            error(
                &format!("{requests} SELAM_TOKEN_SCOPE has a control character at byte 1"),
                "SELAM_TOKEN_SCOPE",
            ),
        ),
        (
            "",
            &[url, ("SELAM_TOKEN_AUDIENCE", " ")],
            error(&format!("{requests} SELAM_TOKEN_AUDIENCE is empty"), "SELAM_TOKEN_AUDIENCE"),
        ),
        (
            "",
            &[url, ("SELAM_TOKEN_RESOURCE", "selam")],
            error(
                &format!(
                    "{requests} SELAM_TOKEN_RESOURCE is not an absolute URL such as https://api.selamgpt.com"
                ),
                "SELAM_TOKEN_RESOURCE",
            ),
        ),
    ] {
        let told = run(NAME, case, variables);
        assert_eq!(told, expected, "{case} {variables:?}");
        assert!(!told.contains("s3cr3t") || told.starts_with("false"));
    }
}
