//! Flags, variables and files, and the messages for invalid ones.

use std::{ffi::OsString, net::Ipv4Addr, os::unix::ffi::OsStringExt};

use tokio::net::TcpListener;
use tower_selam::simulator::{JwtAlgorithm, Server, Simulator};

use crate::support::{Caller, Launch, Protocol, TlsListener, secret};

const KEY: &str = "sk-selam-configured-0123456789";

fn with_key() -> Launch {
    Launch::new().env("SELAM_API_KEY", secret(KEY))
}

/// Asserts that the error line contains each of these.
#[track_caller]
fn assert_names(line: &str, named: &[&str]) {
    for name in named {
        assert!(line.contains(name), "{name:?} is missing in {line:?}");
    }
}

#[tokio::test]
async fn help_lists_flags_and_variables() {
    for flag in ["--help", "-h"] {
        let (status, output, errors) = Launch::bare().arg(flag).run().await;
        assert_eq!((status.code(), &*errors), (Some(0), ""));
        for name in [
            "--listen",
            "--client-token-file",
            "--allow ",
            "--allow-insecure-loopback",
            "--base-url",
            "--ca",
            "--jwt-path",
            "--help",
            "SELAM_API_KEY",
            "SELAM_API_KEY_FILE",
            "SELAM_JWT",
            "SELAM_JWT_FILE",
            "SELAM_TOKEN_URL",
            "SELAM_BASE_URL",
            "/healthz",
            "/metrics",
        ] {
            assert!(output.contains(name), "{name}");
        }
    }
}

#[tokio::test]
async fn the_chosen_port_is_printed() {
    let proxy = with_key().start().await;
    assert!(proxy.address().ip().is_loopback());
    assert_ne!(proxy.address().port(), 0);
    assert_eq!(Caller::http1(&proxy).get("/healthz").await.status, 200);
}

#[tokio::test]
async fn an_invalid_credential_is_named_but_not_shown() {
    let line = Launch::new().fail().await;
    assert_names(&line, &["SELAM_API_KEY"]);

    for bad in
        ["sk-selam-two words-4711", "Bearer sk-selam-4711-bearer", "sk-selam-4711-\u{201c}quoted", "  "]
    {
        let line = Launch::new().env("SELAM_API_KEY", bad).fail().await;
        assert_names(&line, &["SELAM_API_KEY"]);
        assert!(!line.contains("4711"), "{line}");
    }
    let line =
        Launch::new().env("SELAM_API_KEY", OsString::from_vec(b"sk-selam-4711-\xff".to_vec())).fail().await;
    assert_names(&line, &["SELAM_API_KEY"]);
    assert!(!line.contains("4711"), "{line}");

    let line = with_key().env("SELAM_JWT", "ey.4711 4711").fail().await;
    assert_names(&line, &["SELAM_JWT"]);
    assert!(!line.contains("4711"), "{line}");
}

#[tokio::test]
async fn an_invalid_credential_file_is_named() {
    let missing = "/nowhere/selam/key";
    for (variable, flag) in [("SELAM_API_KEY_FILE", "--api-key-file"), ("SELAM_JWT_FILE", "--jwt-file")] {
        let launch = || if flag == "--jwt-file" { with_key() } else { Launch::new() };
        assert_names(&launch().env(variable, missing).fail().await, &[missing]);
        assert_names(&launch().args([flag, missing]).fail().await, &[flag, missing]);
        for bad in ["", "two words-4711\n", "one-4711\nanother-4711\n"] {
            let launch = launch();
            let path = launch.scratch().write("credential", bad);
            let line = launch.env(variable, &path).fail().await;
            assert_names(&line, &[path.to_str().unwrap()]);
            assert!(!line.contains("4711"), "{line}");
        }
    }
}

#[tokio::test]
async fn a_credential_has_only_one_source() {
    let launch = with_key();
    let path = launch.scratch().write("key", secret("sk-selam-in-a-file-0123456789"));
    let line = launch.env("SELAM_API_KEY_FILE", path).fail().await;
    assert_names(&line, &["SELAM_API_KEY"]);
    let line = with_key().args(["--jwt-file", "/a", "--jwt-env", "B"]).fail().await;
    assert_names(&line, &["--jwt-env"]);
}

#[tokio::test]
async fn an_invalid_base_url_is_refused() {
    for url in ["http://127.0.0.1:9/v1", "http://api.example/v1", "api.example", "ftp://api.example"] {
        assert_names(&with_key().env("SELAM_BASE_URL", url).fail().await, &["SELAM_BASE_URL"]);
        assert_names(&with_key().args(["--base-url", url]).fail().await, &["--base-url"]);
    }
    // The opt-in covers loopback addresses only.
    for url in ["http://api.example/v1", "http://localhost.api.example/v1", "http://127.0.0.1@api.example/v1"]
    {
        let line = with_key().env("SELAM_BASE_URL", url).arg("--allow-insecure-loopback").fail().await;
        assert_names(&line, &["SELAM_BASE_URL"]);
    }
    let line = with_key()
        .env("SELAM_BASE_URL", format!("https://user:{}@api.example", secret("url-password-1")))
        .fail();
    assert_names(&line.await, &["SELAM_BASE_URL"]);
}

#[tokio::test]
async fn other_addresses_require_client_tokens() {
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
        let line = Launch::bare().env("SELAM_API_KEY", KEY).args(["--listen", address]).fail().await;
        assert_names(&line, &["--listen", "--client-token-file"]);
    }
    let token = secret("everywhere-token-0123456789");
    let proxy = Launch::bare()
        .env("SELAM_API_KEY", KEY)
        .args(["--listen", "0.0.0.0:0"])
        .callers(&format!("web:{token}\n"))
        .start()
        .await;
    assert!(proxy.address().ip().is_unspecified());
    let caller = Caller::http1(&proxy);
    assert_eq!(caller.get("/healthz").await.status, 200);
    // On other addresses, the metrics require a token.
    caller.get("/metrics").await.assert_error(401, "authentication_error", "missing_api_key");
    assert_eq!(caller.with_token(&token).get("/metrics").await.status, 200);

    // Every loopback address is accepted.
    let proxy = Launch::bare().env("SELAM_API_KEY", KEY).args(["--listen", "127.0.0.2:0"]).start().await;
    assert_eq!(proxy.address().ip(), Ipv4Addr::new(127, 0, 0, 2));
}

#[tokio::test]
async fn an_unusable_address_is_named() {
    for address in ["8080", "127.0.0.1", "127.0.0.1:65536", "nowhere.invalid:80"] {
        let line = Launch::bare().env("SELAM_API_KEY", KEY).args(["--listen", address]).fail().await;
        assert_names(&line, &["--listen", address]);
    }
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let line = Launch::bare().env("SELAM_API_KEY", KEY).args(["--listen", &address]).fail().await;
    assert_names(&line, &["--listen", &address]);
}

#[tokio::test]
async fn an_invalid_token_line_is_named_by_number() {
    let good = secret("a-good-token-0123456789");
    for (lines, number) in [
        (format!("web:{good}\nno-colon-4711\n"), 2),
        (format!("# who may call\n\nweb:{good}\nweb:4711-4711\n"), 4),
        (format!("web:{good}\napp:{good}\n"), 2),
        ("web:\n".to_owned(), 1),
        (":4711-4711\n".to_owned(), 1),
        ("web:4711 4711\n".to_owned(), 1),
    ] {
        let launch = with_key();
        let path = launch.scratch().path("tokens");
        let line = launch.callers(&lines).fail().await;
        assert_names(&line, &["--client-token-file", path.to_str().unwrap(), &format!("line {number}")]);
        assert!(!line.contains("4711"), "{line}");
    }
    assert_names(&with_key().callers("# nobody\n").fail().await, &["--client-token-file", "tokens"]);
    let line = with_key().args(["--client-token-file", "/nowhere/tokens"]).fail().await;
    assert_names(&line, &["--client-token-file", "/nowhere/tokens"]);
}

#[tokio::test]
async fn an_invalid_flag_is_named() {
    for (flag, value) in [
        ("--allow", "GET"),
        ("--allow", "GET:/v2/models"),
        ("--allow", "get:/v1/models"),
        ("--allow", "GET:/v1/../models"),
        ("--ca", "/nowhere/ca.pem"),
        ("--log", "loud"),
        ("--base-url", ""),
    ] {
        assert_names(&with_key().args([flag, value]).fail().await, &[flag]);
    }
    // Without a JWT, the flag would have no effect.
    assert_names(&with_key().args(["--jwt-path", "/v1/audio"]).fail().await, &["--jwt-path"]);
    let with_jwt = || with_key().env("SELAM_JWT", secret("ey.configured.jwt"));
    for prefix in ["audio", "", "/v2", "/v1/../audio", "/v1/audio/*", "/v1/*"] {
        assert_names(&with_jwt().args(["--jwt-path", prefix]).fail().await, &["--jwt-path"]);
    }
    for flag in ["--allow", "--listen", "--ca", "--jwt-path", "--client-token-file"] {
        assert_names(&with_key().arg(flag).fail().await, &[flag]);
    }
    assert_names(&with_key().arg("--no-such-flag").fail().await, &["--no-such-flag"]);
    assert_names(&with_key().args(["--ca", "/a", "--ca", "/b"]).fail().await, &["--ca", "twice"]);
}

#[tokio::test]
async fn secret_arguments_are_not_shown() {
    let key = secret("sk-selam-argument-0123456789");
    for arguments in [
        vec![key.clone()],
        vec!["--api-key".to_owned(), key.clone()],
        vec![format!("--api-key={key}")],
        vec!["--allow-insecure-loopback".to_owned(), key.clone()],
        vec!["-k".to_owned(), key.clone()],
        vec![format!("-k{key}")],
    ] {
        Launch::new().args(arguments).fail().await;
    }
}

#[tokio::test]
async fn a_ca_file_without_certificates_is_named() {
    for content in [
        "",
        "no PEM",
        "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        let launch = with_key();
        let path = launch.scratch().write("bad.pem", content);
        assert_names(&launch.arg("--ca").arg(&path).fail().await, &["--ca", path.to_str().unwrap()]);
    }
}

#[tokio::test]
async fn a_token_endpoint_needs_https_and_complete_credentials() {
    let line = with_key().env("SELAM_TOKEN_URL", "http://login.example/token").fail().await;
    assert_names(&line, &["SELAM_TOKEN_URL"]);
    let line = with_key().args(["--token-url", "login.example"]).fail().await;
    assert_names(&line, &["--token-url"]);
    let launch = with_key().env("SELAM_TOKEN_URL", "https://login.example/token");
    let line = launch.env("SELAM_CLIENT_ID", "me").fail().await;
    assert_names(&line, &["SELAM_CLIENT_SECRET"]);
}

#[tokio::test]
async fn flags_override_variables() {
    let simulator = Simulator::new();
    let api = Server::tls(&simulator).await.unwrap();
    let (key, jwt) = (
        secret(simulator.issue_key()),
        simulator.mint_jwt(JwtAlgorithm::Hs256, std::time::Duration::MAX / 2),
    );
    let launch = Launch::for_api(&api)
        .env("SELAM_API_KEY", secret("sk-selam-of-the-variable-012"))
        .env("SELAM_JWT", secret("ey.of.the-variable"))
        .env("SELAM_BASE_URL", "https://nowhere.invalid/v1")
        .env("OTHER_JWT", secret(jwt));
    let file = launch.scratch().write("key", &key);
    let proxy = launch
        .args(["--base-url", api.base_url(), "--jwt-env", "OTHER_JWT", "--api-key-file"])
        .arg(file)
        .start()
        .await;
    let answer = Caller::http1(&proxy).post("/v1/audio/agent/sessions", "{}").await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn the_systems_authorities_are_trusted() {
    use crate::support::{Api, SYSTEM, TRUSTED};
    // Signed by an authority that the system trusts.
    let api = TlsListener::signed_by(&SYSTEM, Protocol::Http2).await.exchanges();
    let proxy = with_key().env("SELAM_BASE_URL", api.base_url()).start().await;
    let mut api = api;
    let caller = Caller::http1(&proxy);
    let answer = tokio::spawn(async move { caller.get("/v1/models").await });
    api.next().await.respond(200, crate::support::empty());
    assert_eq!(answer.await.unwrap().status, 200);

    // Signed by another authority: it receives nothing of the request.
    let mut api = TlsListener::signed_by(&TRUSTED, Protocol::Http2).await.exchanges();
    let proxy = with_key().env("SELAM_BASE_URL", api.base_url()).start().await;
    let answer = Caller::http1(&proxy).get("/v1/models").await;
    answer.assert_error(502, "api_error", "upstream_unavailable");
    api.assert_silent();
}

#[tokio::test]
async fn plain_http_needs_no_certificate_authority() {
    let simulator = Simulator::new();
    let api = Server::http(&simulator).await.unwrap();
    let launch = Launch::for_api(&api).env("SELAM_API_KEY", secret(simulator.issue_key()));
    let empty = launch.scratch().write("empty.pem", "");
    let proxy = launch.env("SSL_CERT_FILE", empty).start().await;
    assert_eq!(Caller::http1(&proxy).chat().await.status, 200);
}
