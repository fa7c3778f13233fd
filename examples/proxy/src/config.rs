//! The configuration, from flags and environment variables: [`Config`].

use std::{
    ffi::OsString,
    fmt, io,
    net::{SocketAddr, ToSocketAddrs},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use axum::http::HeaderName;
use lexopt::{Arg, Parser, ValueExt};
use tower_selam::{
    ApiKey, BaseUrl, ConfigError, ConfigErrorKind, Credential, Provider, Refreshing, SelamLayer,
    SelamLayerBuilder, Token, env,
    fleet::Fleet,
    inbound::StripCredentialsLayer,
    source::FileSource,
    verify::{IssuerKeys, JwtVerifier},
};

use crate::{
    browsers::Origin,
    callers,
    fleet::{self, Store},
    login::{self, LogCallers, Login},
    rules::{self, Rule},
    upstream::TokenClient,
};

/// The text of `--help`.
pub const HELP: &str = "\
A backend proxy for SelamAPI: callers use tokens that you issue, the API key stays here.

Usage: proxy [OPTIONS]

Serving
  --listen ADDRESS:PORT       address to serve callers on; with port 0, the line
                              `listening on http://…` shows the port that was chosen
                              [default: 127.0.0.1:8080]
  --client-token-file FILE    the callers: one `name:token` per line, `#` starts a
                              comment. Re-read when it changes. Callers send a token as
                              `Authorization: Bearer`, `X-API-Key` or `api-key`, or as a
                              WebSocket subprotocol. This or the app's login is required
                              unless the proxy listens on a loopback address; without
                              either, only programs on this machine are served
  --allow METHOD:PATH         allow only this method and path, refuse others with a 403;
                              repeatable. METHOD may be `*`, which stands for GET, HEAD,
                              POST, PUT, PATCH, DELETE and OPTIONS. PATH is one path, or
                              ends with `/*` to allow everything below it:
                              POST:/v1/chat/completions, GET:/v1/*, '*:/v1/audio/*'
  --allow-origin ORIGIN       let web pages of this origin call the proxy, and refuse all
                              others with a 403; https://app.example,
                              https://*.example.com for its subdomains, or `*`, which
                              requires client tokens or a login; repeatable, or
                              separated by commas
                              [SELAM_PROXY_ALLOW_ORIGIN]
  --voice-agent               serve Socket.IO clients of the voice agent at /socket.io/,
                              polling and WebSocket; requires a JWT. With --allow, it
                              needs '*:/socket.io/' as well
                              [SELAM_PROXY_VOICE_AGENT=true]
  --strip-header NAME         also remove this header from requests; NAME may end with
                              `*`; repeatable, or separated by commas
                              [SELAM_PROXY_STRIP_HEADER]
  --keep-header NAME          forward this header, although it tells of the caller's
                              network or identity; repeatable, or separated by commas
                              [SELAM_PROXY_KEEP_HEADER]

The app's login (its users call with their JWTs, in the place of client tokens; each flag
has a variable: SELAM_PROXY_JWT_ISSUER for --jwt-issuer, and so on)
  --jwt-issuer URL            accept JWTs of this issuer. Its keys are found by OpenID
                              Connect discovery, unless one of the next two is given
  --jwks URL|FILE             accept JWTs that a key of this JWK set verifies
  --jwt-key-file FILE         accept JWTs that one of these public keys (PEM) verifies.
                              Files are re-read when they change
  --jwt-audience NAME         accept only JWTs for this audience, the claim `aud`;
                              required; repeatable, or separated by commas
  --jwt-require CLAIM=VALUE   answer 403 to users without this value in this claim, which
                              may be a list; repeatable, or separated by commas. A claim
                              in a claim is written /realm_access/roles
  --jwt-caller-claim CLAIM    claim that names the user, together with the issuer
                              [default: sub]
  --jwt-group-claim CLAIM     claim that names the user's group in the metrics
                              [default: the issuer]
  --log-callers HOW           how users are named in the log: hash, plain or off
                              [default: hash]

Connections of callers
  --keep-alive SECONDS        keep idle connections this long, up to 900; longer than the
                              load balancer in front does
                              [SELAM_PROXY_KEEP_ALIVE, default: 75]
  --head-timeout SECONDS      time for the head of a request, and for the first request
                              of a connection, up to 300
                              [SELAM_PROXY_HEAD_TIMEOUT, default: 30]
  --upgrade-idle SECONDS      close a WebSocket or another upgraded connection after this
                              long without a byte in either direction, up to 86400
                              [SELAM_PROXY_UPGRADE_IDLE, default: 900]
  --max-connections NUMBER    accept no more connections than this. An eighth of them may
                              be idle strangers: connections without an admitted
                              request; beyond that, the oldest stranger is closed
                              [SELAM_PROXY_MAX_CONNECTIONS, default: 8192, or what the
                              limit on file descriptors allows]

The API
  --base-url URL              the API; replaces `/v1` in a request's path
                              [SELAM_BASE_URL, default: https://api.selamgpt.com/v1]
  --ca FILE                   trust these certificate authorities (PEM) in addition to the
                              system's
  --api-idle SECONDS          reuse idle connections to the API for this long at most, up
                              to 900; less if the API's Keep-Alive header says so
                              [SELAM_PROXY_API_IDLE, default: what that header says, or 4;
                              60 over HTTP/2]
  --allow-insecure-loopback   allow plain http for the API and the token endpoint on a
                              loopback address, for tests

  HTTPS_PROXY or ALL_PROXY names an HTTP proxy on the way to the API and to the token
  endpoint, NO_PROXY the hosts that are connected to directly.

Credentials (at most one flag for each; a flag overrides the environment)
  --api-key-file FILE         file with the API key, re-read when the key is rotated
                              [SELAM_API_KEY_FILE, or SELAM_API_KEY: the key itself]
  --api-key-env VARIABLE      variable with the API key
  --jwt-file FILE             file with a JWT to send in addition to the key, re-read when
                              the JWT is refreshed
                              [SELAM_JWT_FILE, or SELAM_JWT: the JWT itself]
  --jwt-env VARIABLE          variable with the JWT
  --token-url URL             OAuth 2.0 token endpoint that issues JWTs, called with the
                              key, or as the client SELAM_CLIENT_ID with the secret
                              SELAM_CLIENT_SECRET or the file SELAM_CLIENT_SECRET_FILE,
                              by the method SELAM_CLIENT_AUTH: client_secret_basic,
                              client_secret_post or none. SELAM_TOKEN_SCOPE,
                              SELAM_TOKEN_AUDIENCE and SELAM_TOKEN_RESOURCE say what
                              to request [SELAM_TOKEN_URL]
  --jwt-path PREFIX           send the JWT only to this path and below, and the key alone
                              to others; repeatable

  Replicas of the proxy can share the JWTs of the token endpoint, the proxy's own and each
  user's. One of them asks for all; a JWT that the API refuses is replaced in all:
  --fleet NAME                the fleet's name, the same in each replica
                              [SELAM_FLEET]
  --fleet-key-file FILE       file with the key that encrypts what they share: 32 bytes in
                              base64; further lines are former keys
                              [SELAM_FLEET_KEY_FILE]
  SELAM_FLEET_STORE           the Redis or Valkey that keeps it: redis://HOST:PORT,
                              rediss://HOST:PORT for TLS, or unix:///PATH. Without it,
                              each replica goes on alone

  No flag takes a key or a JWT itself: every user of the machine can read a program's
  arguments. A variable that is set to nothing counts as not set.

Other
  --log LEVEL                 verbosity of the log on standard error: off, error, warn,
                              info, debug [default: info, one line per request]
  -h, --help                  print this help

  GET /healthz                200 while the proxy serves; needs no token
  GET /metrics                metrics for Prometheus; needs a client token or a JWT if
                              either is configured

On SIGTERM, requests in flight have 30 seconds to finish. Exit code 2 means that the
configuration is invalid.
";

/// The parsed command line.
#[derive(Debug)]
pub enum Command {
    Help,
    Serve(Box<Config>),
}

/// The settings of a proxy.
#[derive(Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub client_token_file: Option<PathBuf>,
    /// If empty, every method and path is allowed.
    pub allow: Vec<Rule>,
    /// The origins whose web pages may call the proxy. If empty, answers have no CORS headers.
    pub allow_origins: Vec<Origin>,
    /// Whether `/socket.io/` is served.
    pub voice_agent: bool,
    pub ca: Option<PathBuf>,
    pub log: tracing::level_filters::LevelFilter,
    /// Requests to these paths carry JWT and key, others the key alone. If empty, all carry both.
    pub jwt_paths: Vec<String>,
    /// Headers that are removed from requests, in addition to the library's list; with a final `*`, all that start so.
    strip_headers: Vec<String>,
    /// Headers that are forwarded although the library's list has them.
    keep_headers: Vec<HeaderName>,
    /// Whether a flag or a variable provides a JWT.
    pub has_jwt: bool,
    /// Whether a token endpoint exchanges the JWTs of the app's users for JWTs of the same users.
    pub exchanges: bool,
    pub allow_insecure_loopback: bool,
    pub limits: Limits,
    /// How long idle connections to the API are reused; `None` for the defaults.
    pub api_idle: Option<Duration>,
    login: LoginSettings,
    fleet: FleetSettings,
    base_url: Option<String>,
    api_key: Option<CredentialSource>,
    jwt: Option<CredentialSource>,
}

/// The app's login, as the flags describe it.
#[derive(Debug, Default)]
struct LoginSettings {
    issuer: Option<String>,
    /// A URL or a file.
    jwks: Option<String>,
    key_file: Option<PathBuf>,
    audiences: Vec<String>,
    required: Vec<(String, String)>,
    caller_claim: Option<String>,
    group_claim: Option<String>,
    log: LogCallers,
}

/// The fleet, as flags and variables describe it.
#[derive(Debug, Default)]
struct FleetSettings {
    name: Option<String>,
    store: Option<Store>,
    key_file: Option<PathBuf>,
}

/// Limits on the connections of callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long an idle connection is kept.
    pub keep_alive: Duration,
    /// How long the head of a request may take, and the first request of a connection.
    pub head_timeout: Duration,
    /// How long an upgraded connection may be without a byte in either direction.
    pub upgrade_idle: Duration,
    /// How many connections there may be.
    pub max_connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            keep_alive: Duration::from_secs(75),
            head_timeout: Duration::from_secs(30),
            upgrade_idle: Duration::from_secs(900),
            max_connections: 8192,
        }
    }
}

const NO_FLEET: &str = "there is no fleet; set --fleet NAME";

/// The flags that can be set by a variable as well.
const WITH_VARIABLE: [&str; 19] = [
    "--keep-alive",
    "--head-timeout",
    "--upgrade-idle",
    "--max-connections",
    "--api-idle",
    "--strip-header",
    "--keep-header",
    "--allow-origin",
    "--voice-agent",
    "--jwt-issuer",
    "--jwks",
    "--jwt-key-file",
    "--jwt-audience",
    "--jwt-require",
    "--jwt-caller-claim",
    "--jwt-group-claim",
    "--log-callers",
    fleet::FLEET,
    fleet::KEY_FILE,
];

/// The flags that may be given more than once.
const REPEATABLE: [&str; 7] = [
    "--allow",
    "--allow-origin",
    "--jwt-path",
    "--strip-header",
    "--keep-header",
    "--jwt-audience",
    "--jwt-require",
];

/// The name of a flag's variable: `SELAM_PROXY_KEEP_ALIVE` for `--keep-alive`. Programs of the fleet that are not proxies have
/// the same variables.
fn variable_of(flag: &str) -> String {
    let prefix = if flag.starts_with(fleet::FLEET) { "SELAM" } else { "SELAM_PROXY" };
    format!("{prefix}_{}", flag.trim_start_matches('-').replace('-', "_").to_ascii_uppercase())
}

/// Where a credential comes from, according to a flag.
#[derive(Clone, Debug, PartialEq)]
enum CredentialSource {
    File(PathBuf),
    Variable(String),
    /// A token endpoint, which issues JWTs.
    Endpoint(String),
}

/// An invalid setting: one line that names the setting and contains no secret.
#[derive(Debug, PartialEq)]
pub struct Error(String);

impl Error {
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }

    /// An invalid value of a flag.
    pub fn for_flag(flag: &str, message: impl fmt::Display) -> Self {
        Self(format!("{flag}: {message}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl Command {
    /// Parses the arguments, without the program's name. `variable` reads an environment variable; an empty one counts as not
    /// set.
    ///
    /// # Errors
    ///
    /// The first invalid argument, or an invalid combination.
    pub fn parse(
        arguments: impl IntoIterator<Item = OsString>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Error> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let mut config = Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            client_token_file: None,
            allow: Vec::new(),
            allow_origins: Vec::new(),
            voice_agent: false,
            ca: None,
            log: tracing::level_filters::LevelFilter::INFO,
            jwt_paths: Vec::new(),
            strip_headers: Vec::new(),
            keep_headers: Vec::new(),
            has_jwt: false,
            exchanges: false,
            allow_insecure_loopback: false,
            limits: Limits::default(),
            api_idle: None,
            login: LoginSettings::default(),
            fleet: FleetSettings::default(),
            base_url: None,
            api_key: None,
            jwt: None,
        };
        let mut parser = Parser::from_args(arguments);
        let mut seen: Vec<String> = Vec::new();
        while let Some(argument) = parser.next().map_err(unexpected)? {
            let flag = match argument {
                Arg::Short('h') => return Ok(Self::Help),
                Arg::Long(name) => format!("--{name}"),
                Arg::Short(_) => return Err(Error::new(format!("{}; see --help", argument.unexpected()))),
                // The value is not shown: it may be a secret whose flag is missing.
                Arg::Value(_) => return Err(Error::new("unexpected argument; see --help")),
            };
            if !REPEATABLE.contains(&&*flag) && seen.contains(&flag) {
                return Err(Error::for_flag(&flag, "is given twice"));
            }
            if flag == "--help" {
                return Ok(Self::Help);
            }
            let value = || match parser.value() {
                Ok(value) if value.is_empty() => Err(Error::for_flag(&flag, "the value is empty")),
                Ok(value) => Ok(value),
                Err(_) => Err(Error::for_flag(&flag, "needs a value")),
            };
            config.set(&flag, &flag, value)?;
            seen.push(flag);
        }
        for flag in WITH_VARIABLE {
            let name = variable_of(flag);
            if !seen.iter().any(|seen| seen == flag)
                && let Some(value) = variable(&name)
            {
                config.set(flag, &name, || Ok(value))?;
            }
        }
        let jwts = [env::SELAM_JWT, env::SELAM_JWT_FILE, env::SELAM_TOKEN_URL];
        config.has_jwt = config.jwt.is_some() || jwts.into_iter().any(|name| variable(name).is_some());
        let has_endpoint = match &config.jwt {
            None => variable(env::SELAM_TOKEN_URL).is_some(),
            Some(source) => matches!(source, CredentialSource::Endpoint(_)),
        };
        config.exchanges = config.login.is_configured() && has_endpoint;
        if let Some(url) = variable(fleet::STORE) {
            let url =
                url.string().map_err(|_| Error::for_flag(fleet::STORE, "the value is not valid Unicode"))?;
            config.fleet.store = Some(Store::parse(&url)?);
        }
        config.fleet.check(has_endpoint)?;
        config.check()?;
        Ok(Self::Serve(Box::new(config)))
    }
}

impl Config {
    /// Sets what a flag stands for. `name` is the flag, or the variable that takes its place.
    fn set(
        &mut self,
        flag: &str,
        name: &str,
        value: impl FnOnce() -> Result<OsString, Error>,
    ) -> Result<(), Error> {
        let text = |value: OsString| {
            value.string().map_err(|_| Error::for_flag(name, "the value is not valid Unicode"))
        };
        match flag {
            "--listen" => self.listen = address(&text(value()?)?)?,
            "--client-token-file" => self.client_token_file = Some(value()?.into()),
            "--allow" => {
                let rule = Rule::parse(&text(value()?)?).map_err(|message| Error::for_flag(name, message))?;
                self.allow.push(rule);
            }
            "--allow-origin" => {
                for origin in list(&text(value()?)?) {
                    let origin = Origin::parse(origin).map_err(|message| Error::for_flag(name, message))?;
                    self.allow_origins.push(origin);
                }
            }
            "--voice-agent" if name == flag => self.voice_agent = true,
            "--voice-agent" => self.voice_agent = boolean(name, &text(value()?)?)?,
            "--base-url" => self.base_url = Some(text(value()?)?),
            "--ca" => self.ca = Some(value()?.into()),
            "--allow-insecure-loopback" => self.allow_insecure_loopback = true,
            "--api-key-file" => set_once(&mut self.api_key, name, CredentialSource::File(value()?.into()))?,
            "--api-key-env" => {
                set_once(&mut self.api_key, name, CredentialSource::Variable(text(value()?)?))?
            }
            "--jwt-file" => set_once(&mut self.jwt, name, CredentialSource::File(value()?.into()))?,
            "--jwt-env" => set_once(&mut self.jwt, name, CredentialSource::Variable(text(value()?)?))?,
            "--token-url" => set_once(&mut self.jwt, name, CredentialSource::Endpoint(text(value()?)?))?,
            "--jwt-path" => {
                let prefix = text(value()?)?;
                rules::parse_prefix(&prefix).map_err(|message| Error::for_flag(name, message))?;
                self.jwt_paths.push(prefix);
            }
            "--strip-header" => {
                for header in list(&text(value()?)?) {
                    let start = header.strip_suffix('*').unwrap_or(header);
                    header_name(name, start)?;
                    self.strip_headers.push(header.to_ascii_lowercase());
                }
            }
            "--keep-header" => {
                for header in list(&text(value()?)?) {
                    let header = header_name(name, header)?;
                    if callers::may_carry_token(&header) {
                        return Err(Error::for_flag(
                            name,
                            format!("{header} may carry a client token, which must not reach the API"),
                        ));
                    }
                    self.keep_headers.push(header);
                }
            }
            "--jwt-issuer" => self.login.issuer = Some(text(value()?)?),
            "--jwks" => self.login.jwks = Some(text(value()?)?),
            "--jwt-key-file" => self.login.key_file = Some(value()?.into()),
            "--jwt-audience" => self.login.audiences.extend(list(&text(value()?)?).map(str::to_owned)),
            "--jwt-require" => {
                for rule in list(&text(value()?)?) {
                    let (claim, value) = rule
                        .split_once('=')
                        .filter(|(claim, _)| !claim.is_empty())
                        .ok_or_else(|| Error::for_flag(name, format!("{rule:?} must be CLAIM=VALUE")))?;
                    self.login.required.push((claim.to_owned(), value.to_owned()));
                }
            }
            "--jwt-caller-claim" => self.login.caller_claim = Some(text(value()?)?),
            "--jwt-group-claim" => self.login.group_claim = Some(text(value()?)?),
            fleet::FLEET => self.fleet.name = Some(text(value()?)?),
            fleet::KEY_FILE => self.fleet.key_file = Some(value()?.into()),
            "--log-callers" => {
                self.login.log = match &*text(value()?)? {
                    "hash" => LogCallers::Hash,
                    "plain" => LogCallers::Plain,
                    "off" => LogCallers::Off,
                    _ => return Err(Error::for_flag(name, "must be hash, plain or off")),
                };
            }
            "--log" => {
                self.log = text(value()?)?
                    .parse()
                    .map_err(|_| Error::for_flag(name, "must be off, error, warn, info or debug"))?;
            }
            "--keep-alive" => self.limits.keep_alive = seconds(name, &text(value()?)?, 900)?,
            "--head-timeout" => self.limits.head_timeout = seconds(name, &text(value()?)?, 300)?,
            "--upgrade-idle" => self.limits.upgrade_idle = seconds(name, &text(value()?)?, 86_400)?,
            "--api-idle" => self.api_idle = Some(seconds(name, &text(value()?)?, 900)?),
            "--max-connections" => {
                self.limits.max_connections = number(name, &text(value()?)?, "", 8..=1_000_000)?;
            }
            "--api-key" | "--jwt" | "--client-secret" | "--client-token" | "--fleet-store" => {
                return Err(Error::for_flag(
                    name,
                    "secrets are not accepted as arguments, which every user of this machine can read; see --help",
                ));
            }
            _ => return Err(Error::new(format!("unknown flag {flag}; see --help"))),
        }
        Ok(())
    }

    /// Checks settings that depend on each other.
    fn check(&self) -> Result<(), Error> {
        self.login.check()?;
        let has_callers = self.client_token_file.is_some() || self.login.is_configured();
        if !has_callers && !self.is_local() {
            return Err(Error::for_flag(
                "--listen",
                format!(
                    "{} is not a loopback address, so --client-token-file FILE or --jwt-issuer URL is required",
                    self.listen
                ),
            ));
        }
        if !has_callers && self.allow_origins.contains(&Origin::Any) {
            return Err(Error::for_flag(
                "--allow-origin",
                "* requires --client-token-file FILE or --jwt-issuer URL",
            ));
        }
        for (flag, is_given) in
            [("--jwt-path", !self.jwt_paths.is_empty()), ("--voice-agent", self.voice_agent)]
        {
            if is_given && !self.has_jwt {
                let [jwt, file, url] = [env::SELAM_JWT, env::SELAM_JWT_FILE, env::SELAM_TOKEN_URL];
                return Err(Error::for_flag(
                    flag,
                    format!("no JWT is configured; set {jwt}, {file} or {url}"),
                ));
            }
        }
        let has_rule = self.allow.iter().any(Rule::is_for_voice);
        if self.voice_agent && !self.allow.is_empty() && !has_rule {
            return Err(Error::for_flag(
                "--voice-agent",
                "no --allow covers it; add --allow '*:/socket.io/'",
            ));
        }
        if has_rule && !self.voice_agent {
            return Err(Error::for_flag("--allow", "/socket.io/ is served with --voice-agent only"));
        }
        Ok(())
    }

    /// Whether only programs on this machine can reach the proxy.
    pub fn is_local(&self) -> bool {
        self.listen.ip().to_canonical().is_loopback()
    }

    /// Builds the app's login, if there is one. `client` fetches its keys, when the first user calls.
    ///
    /// # Errors
    ///
    /// A URL is invalid, or a file has no key.
    pub fn login(&self, client: TokenClient) -> Result<Option<Login>, Error> {
        let LoginSettings { issuer, jwks, key_file, audiences, required, caller_claim, group_claim, log } =
            &self.login;
        let is_lax = self.allow_insecure_loopback;
        let (flag, keys) = match (jwks, key_file, issuer) {
            (Some(url), ..) if url.contains("://") => (
                "--jwks",
                match is_lax {
                    true => IssuerKeys::at_url_allow_insecure_loopback(url, client),
                    false => IssuerKeys::at_url(url, client),
                },
            ),
            (Some(file), ..) => ("--jwks", IssuerKeys::in_file(file)),
            (None, Some(file), _) => ("--jwt-key-file", IssuerKeys::in_file(file)),
            (None, None, Some(issuer)) => (
                "--jwt-issuer",
                match is_lax {
                    true => IssuerKeys::discover_allow_insecure_loopback(issuer, client),
                    false => IssuerKeys::discover(issuer, client),
                },
            ),
            (None, None, None) => return Ok(None),
        };
        let keys = keys.map_err(|error| from_library(Some(flag), &error))?;
        let mut verifier = JwtVerifier::new(keys, audiences.iter().cloned());
        if let Some(issuer) = issuer {
            verifier = verifier.with_issuer(issuer.trim());
        }
        let rules = login::Rules {
            caller_claim: caller_claim.clone().unwrap_or_else(|| "sub".to_owned()),
            group_claim: group_claim.clone(),
            required: required.clone(),
            log: *log,
        };
        Ok(Some(Login::new(verifier, rules)))
    }

    /// Joins the fleet, if there is one. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// The name, or a file, is invalid.
    pub fn join_fleet(&self) -> Result<Option<Fleet>, Error> {
        let FleetSettings { name: Some(name), store: Some(store), key_file: Some(key_file) } = &self.fleet
        else {
            return Ok(None);
        };
        fleet::join(name, store, key_file, self.ca.as_deref()).map(Some)
    }

    /// Logs what is valid, but not advisable.
    pub fn warn(&self) {
        if let Some(path) = &self.fleet.key_file {
            fleet::warn_if_public(path);
        }
    }

    /// Builds the layer that removes what tells of the caller from requests.
    pub fn strip_credentials(&self) -> StripCredentialsLayer {
        let mut layer = StripCredentialsLayer::new();
        for name in &self.keep_headers {
            layer = layer.dangerous_keep_header(name.clone());
        }
        for name in &self.strip_headers {
            layer = match name.strip_suffix('*') {
                Some(prefix) => layer.with_header_prefix(prefix),
                None => HeaderName::try_from(name).map_or(layer.clone(), |name| layer.with_header(name)),
            };
        }
        layer
    }

    /// Builds the layers. Flags override the environment; `builder` provides the client for the token endpoint.
    ///
    /// # Errors
    ///
    /// A credential or URL is missing or invalid.
    pub fn layer(&self, mut builder: SelamLayerBuilder) -> Result<SelamLayer, Error> {
        if self.allow_insecure_loopback {
            builder = builder.allow_insecure_loopback();
        }
        if let Some(url) = &self.base_url {
            let parsed = if self.allow_insecure_loopback {
                BaseUrl::allow_insecure_loopback(url)
            } else {
                BaseUrl::new(url)
            };
            builder =
                builder.with_base_url(parsed.map_err(|error| from_library(Some("--base-url"), &error))?);
        }
        if let Some(source) = &self.api_key {
            builder = builder.with_api_key(load("--api-key-file", source, ApiKey::from_env_var)?);
        }
        match &self.jwt {
            Some(CredentialSource::Endpoint(url)) => builder = builder.with_token_url(url),
            Some(source) => builder = builder.with_jwt(load("--jwt-file", source, Token::from_env_var)?),
            None => {}
        }
        builder.build_with_env().map_err(|error| {
            let by_flag = matches!(self.jwt, Some(CredentialSource::Endpoint(_)))
                && error.env_var().is_none()
                && error.file().is_none();
            from_library(by_flag.then_some("--token-url"), &error)
        })
    }
}

impl LoginSettings {
    /// Whether there are keys, or an issuer that has some.
    fn is_configured(&self) -> bool {
        self.issuer.is_some() || self.jwks.is_some() || self.key_file.is_some()
    }

    fn check(&self) -> Result<(), Error> {
        if self.jwks.is_some() && self.key_file.is_some() {
            return Err(Error::for_flag("--jwt-key-file", "cannot be combined with --jwks"));
        }
        let settings = [
            ("--jwt-audience", !self.audiences.is_empty()),
            ("--jwt-require", !self.required.is_empty()),
            ("--jwt-caller-claim", self.caller_claim.is_some()),
            ("--jwt-group-claim", self.group_claim.is_some()),
        ];
        match settings.into_iter().find(|(_, is_set)| *is_set) {
            Some((flag, _)) if !self.is_configured() => Err(Error::for_flag(
                flag,
                "there is no login; set --jwt-issuer URL, --jwks URL or FILE, or --jwt-key-file FILE",
            )),
            _ if self.is_configured() && self.audiences.is_empty() => Err(Error::new(
                "--jwt-audience NAME is required with a login: the JWTs that its issuer issues to other services must not be accepted",
            )),
            _ => Ok(()),
        }
    }
}

impl FleetSettings {
    fn check(&self, has_endpoint: bool) -> Result<(), Error> {
        let Self { name, store, key_file } = self;
        match (name, store, key_file) {
            (None, None, None) => Ok(()),
            (None, Some(_), _) => Err(Error::for_flag(fleet::STORE, NO_FLEET)),
            (None, None, Some(_)) => Err(Error::for_flag(fleet::KEY_FILE, NO_FLEET)),
            (Some(_), None, _) => Err(Error::for_flag(
                fleet::FLEET,
                format!("{} is not set: the Redis or Valkey that the replicas share", fleet::STORE),
            )),
            (Some(_), _, None) => Err(Error::for_flag(fleet::FLEET, "--fleet-key-file FILE is required")),
            (Some(_), Some(_), Some(_)) if !has_endpoint => Err(Error::for_flag(
                fleet::FLEET,
                format!("no JWT is shared without a token endpoint; set {}", env::SELAM_TOKEN_URL),
            )),
            (Some(_), Some(_), Some(_)) => Ok(()),
        }
    }
}

/// Converts the library's error, and adds the proxy's own remedy.
fn from_library(flag: Option<&str>, error: &ConfigError) -> Error {
    let hint = match (error.kind(), error.env_var()) {
        (ConfigErrorKind::Missing, Some(env::SELAM_API_KEY)) => {
            "; set it, SELAM_API_KEY_FILE or --api-key-file"
        }
        (ConfigErrorKind::NotHttps, _) => "; --allow-insecure-loopback allows http on a loopback address",
        _ => "",
    };
    let message = format!("{error}{hint}");
    match flag {
        Some(flag) => Error::for_flag(flag, message),
        None => Error(message),
    }
}

fn load<C: Credential>(
    flag: &str,
    source: &CredentialSource,
    from_variable: fn(&str) -> Result<C, ConfigError>,
) -> Result<Provider<C>, Error> {
    match source {
        CredentialSource::File(path) => {
            let source = FileSource::new(path);
            // Report an unusable file at startup rather than with the first request.
            source.read().map_err(|error| from_library(Some(flag), &error))?;
            Ok(Provider::Refreshing(Refreshing::new(source)))
        }
        CredentialSource::Variable(name) | CredentialSource::Endpoint(name) => {
            from_variable(name).map(Provider::Fixed).map_err(|error| from_library(None, &error))
        }
    }
}

/// The items of a comma-separated list.
fn list(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn header_name(flag: &str, name: &str) -> Result<HeaderName, Error> {
    // `*` is allowed in names, but nobody who writes it here means that.
    let parsed = HeaderName::from_bytes(name.as_bytes()).ok().filter(|_| !name.contains('*'));
    parsed.ok_or_else(|| Error::for_flag(flag, format!("{name:?} is not the name of a header")))
}

/// Omits the value, which may be a secret whose flag is missing.
fn unexpected(error: lexopt::Error) -> Error {
    match error {
        lexopt::Error::UnexpectedValue { option, .. } => Error::for_flag(&option, "takes no value"),
        _ => Error::new("invalid argument; see --help"),
    }
}

fn address(value: &str) -> Result<SocketAddr, Error> {
    let invalid = |reason: &str| Error::for_flag("--listen", format!("{value:?} {reason}"));
    match value.to_socket_addrs() {
        Ok(mut addresses) => addresses.next().ok_or_else(|| invalid("does not resolve to an address")),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Err(invalid("must be ADDRESS:PORT, for example 127.0.0.1:8080"))
        }
        Err(_) => Err(invalid("does not resolve to an address")),
    }
}

fn seconds(name: &str, value: &str, most: usize) -> Result<Duration, Error> {
    number(name, value, "of seconds ", 1..=most).map(|seconds| Duration::from_secs(seconds as u64))
}

fn number(name: &str, value: &str, of: &str, range: RangeInclusive<usize>) -> Result<usize, Error> {
    match value.parse() {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => {
            let (least, most) = range.into_inner();
            Err(Error::for_flag(name, format!("must be a whole number {of}from {least} to {most}")))
        }
    }
}

fn boolean(name: &str, value: &str) -> Result<bool, Error> {
    match value {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(Error::for_flag(name, "must be true or false")),
    }
}

fn set_once(slot: &mut Option<CredentialSource>, flag: &str, source: CredentialSource) -> Result<(), Error> {
    match slot.replace(source) {
        None => Ok(()),
        Some(_) => Err(Error::for_flag(flag, "cannot be combined with another flag for the same credential")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &str, set: &[&str]) -> Result<Command, Error> {
        parse_with(arguments, |name| set.contains(&name).then(|| "x".into()))
    }

    fn parse_with(arguments: &str, variable: impl Fn(&str) -> Option<OsString>) -> Result<Command, Error> {
        Command::parse(arguments.split_whitespace().map(OsString::from), variable)
    }

    fn config(arguments: &str, set: &[&str]) -> Config {
        match parse(arguments, set).unwrap() {
            Command::Serve(config) => *config,
            Command::Help => panic!("{arguments}"),
        }
    }

    #[test]
    fn flags_are_parsed_in_each_spelling() {
        let config = config(
            "--listen=[::1]:0 --client-token-file tokens --allow POST:/v1/a --allow *:/v1/b/* --base-url http://127.0.0.1:1/v1 \
             --ca ca.pem --allow-insecure-loopback --api-key-file key --token-url https://x/y --jwt-path /v1/a --jwt-path /v1/c/ \
             --log debug",
            &[],
        );
        assert_eq!(config.listen, SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 0)));
        assert_eq!(config.client_token_file.as_deref(), Some("tokens".as_ref()));
        assert_eq!((config.allow.len(), config.jwt_paths.len()), (2, 2));
        assert_eq!(config.ca.as_deref(), Some("ca.pem".as_ref()));
        assert_eq!(config.api_key, Some(CredentialSource::File("key".into())));
        assert_eq!(config.jwt, Some(CredentialSource::Endpoint("https://x/y".to_owned())));
        assert_eq!(config.log, tracing::level_filters::LevelFilter::DEBUG);
        assert!(config.has_jwt && config.allow_insecure_loopback && config.is_local());
        for help in ["-h", "--help", "--listen 127.0.0.1:1 --help"] {
            assert!(matches!(parse(help, &[]), Ok(Command::Help)), "{help}");
        }
    }

    #[test]
    fn limits_have_flags_and_variables() {
        let limits = |arguments: &str, variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
            };
            match parse_with(arguments, variable).unwrap() {
                Command::Serve(config) => config.limits,
                Command::Help => panic!("{arguments}"),
            }
        };
        let wanted = Limits {
            keep_alive: Duration::from_secs(1),
            head_timeout: Duration::from_secs(2),
            upgrade_idle: Duration::from_secs(3),
            max_connections: 8,
        };
        let (flags, values) = (WITH_VARIABLE, ["1", "2", "3", "8", "4"]);
        let by_flags: Vec<_> =
            flags.iter().zip(values).map(|(flag, value)| format!("{flag} {value}")).collect();
        assert_eq!(limits(&by_flags.join(" "), &[]), wanted);
        let names = flags.map(variable_of);
        let by_variables: Vec<_> = names.iter().map(String::as_str).zip(values).collect();
        assert_eq!(limits("", &by_variables), wanted);
        // A flag takes precedence, even over a variable that is invalid.
        assert_eq!(limits(&by_flags.join(" "), &[("SELAM_PROXY_KEEP_ALIVE", "x")]), wanted);
        // Empty counts as not set.
        let empty: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
        assert_eq!(limits("", &empty), Limits::default());
    }

    #[test]
    fn the_voice_agent_needs_a_jwt_and_a_rule() {
        let with = |arguments: &str, value: &str| {
            parse_with(arguments, |name| match name {
                "SELAM_JWT" => Some("x".into()),
                "SELAM_PROXY_VOICE_AGENT" => Some(value.into()),
                _ => None,
            })
        };
        let serves = |arguments: &str, value: &str| match with(arguments, value).unwrap() {
            Command::Serve(config) => config.voice_agent,
            Command::Help => panic!("{arguments}"),
        };
        assert!(!serves("", "") && serves("--voice-agent", "") && serves("--voice-agent", "false"));
        assert!(serves("", "true") && serves("", "1") && !serves("", "false") && !serves("", "0"));
        assert!(serves("--voice-agent --allow *:/socket.io/", ""));
        for (arguments, value, expected) in [
            ("", "yes", "SELAM_PROXY_VOICE_AGENT: must be true or false"),
            (
                "--voice-agent --allow GET:/v1/models",
                "",
                "--voice-agent: no --allow covers it; add --allow '*:/socket.io/'",
            ),
            ("--allow GET:/socket.io/", "", "--allow: /socket.io/ is served with --voice-agent only"),
        ] {
            assert_eq!(with(arguments, value).unwrap_err().to_string(), expected);
        }
        let missing = parse("--voice-agent", &[]).unwrap_err().to_string();
        assert_eq!(
            missing,
            "--voice-agent: no JWT is configured; set SELAM_JWT, SELAM_JWT_FILE or SELAM_TOKEN_URL"
        );
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for (flag, range) in [
            ("--keep-alive", "a whole number of seconds from 1 to 900"),
            ("--head-timeout", "a whole number of seconds from 1 to 300"),
            ("--upgrade-idle", "a whole number of seconds from 1 to 86400"),
            ("--api-idle", "a whole number of seconds from 1 to 900"),
            ("--max-connections", "a whole number from 8 to 1000000"),
        ] {
            for value in ["0", "-1", "1.5", "30s", "x", "99999999999999999999", "1000001"] {
                let error = parse(&format!("{flag} {value}"), &[]).unwrap_err().to_string();
                assert_eq!(error, format!("{flag}: must be {range}"), "{value}");
            }
            let name = variable_of(flag);
            assert_eq!(parse("", &[&name]).unwrap_err().to_string(), format!("{name}: must be {range}"));
            assert!(HELP.contains(&format!("[{name}, ")), "{name}");
        }
    }

    #[test]
    fn defaults_are_loopback_and_the_environment() {
        let plain = config("", &[]);
        assert_eq!(plain.listen.to_string(), "127.0.0.1:8080");
        assert!(!plain.has_jwt && plain.is_local() && plain.allow.is_empty());
        for variable in ["SELAM_JWT", "SELAM_JWT_FILE", "SELAM_TOKEN_URL"] {
            assert!(config("--jwt-path /v1/audio", &[variable]).has_jwt, "{variable}");
        }
    }

    #[test]
    fn other_addresses_require_client_tokens() {
        for listen in ["127.0.0.1:0", "127.1.2.3:80", "[::1]:80", "[::ffff:127.0.0.1]:80", "localhost:80"] {
            assert!(parse(&format!("--listen {listen}"), &[]).is_ok(), "{listen}");
        }
        for listen in ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "128.0.0.1:80"] {
            let error = parse(&format!("--listen {listen}"), &[]).unwrap_err().to_string();
            assert!(error.contains(listen) && error.contains("--client-token-file"), "{error}");
            assert!(parse(&format!("--listen {listen} --client-token-file x"), &[]).is_ok(), "{listen}");
            let login = "--jwt-issuer https://login.example --jwt-audience app";
            assert!(parse(&format!("--listen {listen} {login}"), &[]).is_ok(), "{listen}");
        }
    }

    #[test]
    fn origins_are_repeated_or_separated_by_commas() {
        let origins = |arguments: &str, value: &'static str| {
            let variable = |name: &str| (name == "SELAM_PROXY_ALLOW_ORIGIN").then(|| value.into());
            match parse_with(arguments, variable).unwrap() {
                Command::Serve(config) => config.allow_origins,
                Command::Help => panic!("{arguments}"),
            }
        };
        let two = ["https://a.example", "http://localhost:3000"].map(|origin| Origin::parse(origin).unwrap());
        assert_eq!(origins("--allow-origin https://a.example --allow-origin http://localhost:3000", ""), two);
        assert_eq!(origins("--allow-origin https://a.example,http://localhost:3000", "null"), two);
        assert_eq!(origins("", "https://a.example, http://localhost:3000"), two);
        assert_eq!(origins("--client-token-file x", "*"), [Origin::Any]);
        assert_eq!(origins("", ""), []);
    }

    #[test]
    fn invalid_arguments_are_named_without_their_values() {
        for (arguments, expected) in [
            ("--nonsense", "unknown flag --nonsense; see --help"),
            ("-x", "invalid option '-x'; see --help"),
            ("sk-selam-s3cr3t", "unexpected argument; see --help"),
            ("--allow-insecure-loopback=s3cr3t", "--allow-insecure-loopback: takes no value"),
            ("--listen", "--listen: needs a value"),
            ("--api-key-file=", "--api-key-file: the value is empty"),
            ("--listen nowhere", "--listen: \"nowhere\" must be ADDRESS:PORT, for example 127.0.0.1:8080"),
            ("--ca a --ca b", "--ca: is given twice"),
            (
                "--api-key-file a --api-key-env B",
                "--api-key-env: cannot be combined with another flag for the same credential",
            ),
            (
                "--jwt-file a --token-url https://s3cr3t",
                "--token-url: cannot be combined with another flag for the same credential",
            ),
            (
                "--allow /v1/models",
                "--allow: \"/v1/models\" must be METHOD:PATH, for example POST:/v1/chat/completions",
            ),
            ("--jwt-path /audio", "--jwt-path: \"/audio\" must start with /v1/"),
            (
                "--jwt-path /v1/audio",
                "--jwt-path: no JWT is configured; set SELAM_JWT, SELAM_JWT_FILE or SELAM_TOKEN_URL",
            ),
            (
                "--allow-origin https://app.example/",
                "--allow-origin: \"https://app.example/\" must end with the host or port, without a slash: https://app.example",
            ),
            ("--allow-origin *", "--allow-origin: * requires --client-token-file FILE or --jwt-issuer URL"),
            ("--strip-header a*b", "--strip-header: \"a*b\" is not the name of a header"),
            ("--strip-header *", "--strip-header: \"\" is not the name of a header"),
            ("--keep-header X-Forwarded-*", "--keep-header: \"X-Forwarded-*\" is not the name of a header"),
            (
                "--keep-header X-API-Key",
                "--keep-header: x-api-key may carry a client token, which must not reach the API",
            ),
            (
                "--jwt-audience app",
                "--jwt-audience: there is no login; set --jwt-issuer URL, --jwks URL or FILE, or --jwt-key-file FILE",
            ),
            (
                "--jwks https://s3cr3t",
                "--jwt-audience NAME is required with a login: the JWTs that its issuer issues to other services must not be accepted",
            ),
            (
                "--jwks a --jwt-key-file b --jwt-audience app",
                "--jwt-key-file: cannot be combined with --jwks",
            ),
            ("--jwt-require admin", "--jwt-require: \"admin\" must be CLAIM=VALUE"),
            ("--jwt-require =admin", "--jwt-require: \"=admin\" must be CLAIM=VALUE"),
            ("--jwt-issuer a --jwt-issuer b", "--jwt-issuer: is given twice"),
            ("--log-callers names", "--log-callers: must be hash, plain or off"),
            ("--log loud", "--log: must be off, error, warn, info or debug"),
            (
                "--api-key sk-selam-s3cr3t",
                "--api-key: secrets are not accepted as arguments, which every user of this machine can read; see --help",
            ),
        ] {
            let error = parse(arguments, &[]).unwrap_err().to_string();
            assert_eq!(error, expected);
            assert!(!error.contains("s3cr3t") && !error.contains('\n'));
        }
    }

    #[test]
    fn the_login_has_flags_and_variables() {
        let values = [
            ("--jwt-issuer", "https://login.example"),
            ("--jwks", "keys.json"),
            ("--jwt-audience", "app,web"),
            ("--jwt-require", "role=admin,verified=true"),
            ("--jwt-caller-claim", "email"),
            ("--jwt-group-claim", "plan"),
            ("--log-callers", "off"),
        ];
        let flags: Vec<_> = values.iter().map(|(flag, value)| format!("{flag} {value}")).collect();
        let variable = |name: &str| {
            let (_, value) = values.iter().find(|(flag, _)| variable_of(flag) == name)?;
            Some(OsString::from(value))
        };
        for command in [parse(&flags.join(" "), &[]), parse_with("", variable)] {
            let Ok(Command::Serve(config)) = command else { panic!("{command:?}") };
            let LoginSettings { issuer, jwks, audiences, required, caller_claim, group_claim, log, .. } =
                config.login;
            assert_eq!((issuer.as_deref(), jwks.as_deref()), (Some(values[0].1), Some("keys.json")));
            assert_eq!(audiences, ["app", "web"]);
            assert_eq!(
                required,
                [("role", "admin"), ("verified", "true")]
                    .map(|(claim, value)| (claim.to_owned(), value.to_owned()))
            );
            assert_eq!((caller_claim.as_deref(), group_claim.as_deref()), (Some("email"), Some("plan")));
            assert_eq!(log, LogCallers::Off);
        }
    }

    #[test]
    fn a_fleet_needs_a_store_keys_and_an_endpoint() {
        let with = |arguments: &str, variables: &[(&str, &str)]| {
            parse_with(arguments, |name| {
                let (_, value) = variables.iter().find(|(known, _)| *known == name)?;
                Some(OsString::from(value))
            })
        };
        let store = ("SELAM_FLEET_STORE", "redis://:s3cr3t@store.internal");
        let url = ("SELAM_TOKEN_URL", "https://login.example/token");
        let flags = "--fleet billing --fleet-key-file keys";
        let by_variables = [store, url, ("SELAM_FLEET", "billing"), ("SELAM_FLEET_KEY_FILE", "keys")];
        for (arguments, variables) in [
            (flags, &[store, url][..]),
            (&format!("{flags} --token-url {}", url.1), &[store]),
            ("", &by_variables),
        ] {
            let Command::Serve(config) = with(arguments, variables).unwrap() else { panic!("{arguments}") };
            let FleetSettings { name, store, key_file } = &config.fleet;
            assert_eq!((name.as_deref(), key_file), (Some("billing"), &Some("keys".into())));
            assert!(store.is_some() && !format!("{config:?}").contains("s3cr3t"), "{config:?}");
        }
        for (arguments, variables, expected) in [
            (
                flags,
                &[url][..],
                "--fleet: SELAM_FLEET_STORE is not set: the Redis or Valkey that the replicas share",
            ),
            ("--fleet billing", &[store, url], "--fleet: --fleet-key-file FILE is required"),
            ("--fleet-key-file keys", &[url], "--fleet-key-file: there is no fleet; set --fleet NAME"),
            ("", &[store, url], "SELAM_FLEET_STORE: there is no fleet; set --fleet NAME"),
            (flags, &[store], "--fleet: no JWT is shared without a token endpoint; set SELAM_TOKEN_URL"),
            (
                &format!("{flags} --jwt-file jwt"),
                &[store, url],
                "--fleet: no JWT is shared without a token endpoint; set SELAM_TOKEN_URL",
            ),
        ] {
            assert_eq!(with(arguments, variables).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn library_errors_name_flag_and_remedy() {
        let layer = |flags: &str| config(flags, &[]).layer(SelamLayer::builder()).unwrap_err().to_string();
        assert_eq!(
            layer("--base-url http://127.0.0.1:1/v1 --api-key-file x"),
            "--base-url: base URL is not https; --allow-insecure-loopback allows http on a loopback address"
        );
        assert!(
            layer("--api-key-file /no/such/file")
                .starts_with("--api-key-file: API key from the file /no/such/file")
        );
        assert_eq!(
            layer("--api-key-env NO_SUCH_VARIABLE"),
            "API key from the environment variable NO_SUCH_VARIABLE is not set"
        );
    }

    #[test]
    fn help_names_every_flag_and_fits_a_terminal() {
        let others = [
            "--listen",
            "--client-token-file",
            "--allow",
            "--base-url",
            "--ca",
            "--allow-insecure-loopback",
            "--api-key-file",
            "--api-key-env",
            "--jwt-file",
            "--jwt-env",
            "--token-url",
            "--jwt-path",
            "--fleet",
            "--fleet-key-file",
            "--log",
            "--help",
        ];
        for flag in WITH_VARIABLE.into_iter().chain(others) {
            assert!(HELP.contains(&format!("{flag} ")) || HELP.contains(&format!("{flag}\n")), "{flag}");
        }
        assert!(HELP.lines().all(|line| line.chars().count() <= 90));
    }
}
