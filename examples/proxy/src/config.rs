//! What the proxy is told, by flags and by the environment: [`Config`].

use std::{
    ffi::OsString,
    fmt,
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
};

use lexopt::{Arg, Parser, ValueExt};
use tower_selam::{
    ApiKey, BaseUrl, ConfigError, ConfigErrorKind, Credential, Provider, Refreshing, SelamLayer,
    SelamLayerBuilder, Token, env, source::FileSource,
};

use crate::rules::{self, Rule};

/// What `--help` says.
pub const HELP: &str = "\
A backend proxy for SelamAPI: callers have a token of yours, the API key stays here.

Usage: proxy [OPTIONS]

Serving
  --listen ADDRESS:PORT       where callers are served; port 0 takes a free one, and
                              the line `listening on http://…` tells which
                              [default: 127.0.0.1:8080]
  --client-token-file FILE    who may call: one `name:token` a line, `#` begins a comment.
                              Read again when it changes. Callers send their token as
                              `Authorization: Bearer`, `X-API-Key` or `api-key`.
                              Without it, the proxy listens on loopback addresses only
  --allow METHOD:PATH         what may be called, else 403; may be repeated. METHOD may be
                              `*`. PATH is one path, or with `/*` at its end all below it:
                              POST:/v1/chat/completions, GET:/v1/*, '*:/v1/audio/*'

The API
  --base-url URL              where `/v1` of the proxy leads
                              [SELAM_BASE_URL, default: https://api.selamgpt.com/v1]
  --ca FILE                   trust these certificate authorities (PEM) as well as the
                              system's
  --allow-insecure-loopback   let the API and the token endpoint be plain http on this
                              machine, for tests

Credentials (of each, one; a flag counts more than the environment)
  --api-key-file FILE         the API key, read again when it is rotated
                              [SELAM_API_KEY_FILE, or SELAM_API_KEY: the key itself]
  --api-key-env VARIABLE      the API key in a variable of another name
  --jwt-file FILE             a JWT to send beside the key, read again when it is renewed
                              [SELAM_JWT_FILE, or SELAM_JWT: the JWT itself]
  --jwt-env VARIABLE          the JWT in a variable of another name
  --token-url URL             an OAuth 2.0 token endpoint that JWTs come from, asked as
                              SELAM_CLIENT_ID with SELAM_CLIENT_SECRET, else with the key
                              [SELAM_TOKEN_URL]
  --jwt-path PREFIX           send the JWT to this path and what is below it only, and the
                              key alone elsewhere; may be repeated

  There is no flag for a key or a JWT itself: every user of the machine sees a program's
  arguments.

Also
  --log LEVEL                 what goes to standard error: off, error, warn, info, debug
                              [default: info, a line for each request]
  -h, --help                  this

  GET /healthz                200 while the proxy serves; for everybody
  GET /metrics                for Prometheus; needs a client's token unless the proxy
                              listens on a loopback address

SIGTERM ends it: what runs has 30 seconds to finish. Exit code 2: bad configuration.
";

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    Help,
    Serve(Box<Config>),
}

/// How to serve.
#[derive(Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub client_token_file: Option<PathBuf>,
    /// Everything, when there is none.
    pub allow: Vec<Rule>,
    pub ca: Option<PathBuf>,
    pub log: tracing::level_filters::LevelFilter,
    /// These paths get JWT and key, the others the key alone; all get both, when there is none.
    pub jwt_paths: Vec<String>,
    /// Whether there is a JWT to send.
    pub has_jwt: bool,
    pub allow_insecure_loopback: bool,
    base_url: Option<String>,
    api_key: Option<Place>,
    jwt: Option<Place>,
}

/// Where a flag says that a credential is.
#[derive(Clone, Debug, PartialEq)]
enum Place {
    File(PathBuf),
    Variable(String),
    /// Of a JWT.
    Endpoint(String),
}

/// What is wrong with the configuration, and where: one line, without any secret.
#[derive(Debug, PartialEq)]
pub struct Error(String);

impl Error {
    pub fn new(said: impl Into<String>) -> Self {
        Self(said.into())
    }

    /// What is wrong with what a flag was given.
    pub fn of_flag(flag: &str, said: impl fmt::Display) -> Self {
        Self(format!("{flag}: {said}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl Command {
    /// Reads the arguments, without the program's name; `is_set` tells whether an environment variable is.
    ///
    /// # Errors
    ///
    /// At the first argument that makes no sense.
    pub fn parse(
        arguments: impl IntoIterator<Item = OsString>,
        is_set: impl Fn(&str) -> bool,
    ) -> Result<Self, Error> {
        let mut config = Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            client_token_file: None,
            allow: Vec::new(),
            ca: None,
            log: tracing::level_filters::LevelFilter::INFO,
            jwt_paths: Vec::new(),
            has_jwt: false,
            allow_insecure_loopback: false,
            base_url: None,
            api_key: None,
            jwt: None,
        };
        let mut parser = Parser::from_args(arguments);
        let mut given: Vec<String> = Vec::new();
        while let Some(argument) = parser.next().map_err(unexpected)? {
            let flag = match argument {
                Arg::Short('h') => return Ok(Self::Help),
                Arg::Long(name) => format!("--{name}"),
                Arg::Short(_) => return Err(Error::new(format!("{}; see --help", argument.unexpected()))),
                // It may be a secret that lost its flag.
                Arg::Value(_) => return Err(Error::new("an argument belongs to no flag; see --help")),
            };
            let repeats = matches!(&*flag, "--allow" | "--jwt-path");
            if !repeats && given.contains(&flag) {
                return Err(Error::of_flag(&flag, "is given twice"));
            }
            let mut value = || match parser.value() {
                Ok(value) if value.is_empty() => Err(Error::of_flag(&flag, "is empty")),
                Ok(value) => Ok(value),
                Err(_) => Err(Error::of_flag(&flag, "needs a value")),
            };
            let text =
                |value: OsString| value.string().map_err(|_| Error::of_flag(&flag, "is not valid Unicode"));
            match &*flag {
                "--help" => return Ok(Self::Help),
                "--listen" => config.listen = address(&text(value()?)?)?,
                "--client-token-file" => config.client_token_file = Some(value()?.into()),
                "--allow" => {
                    let rule = Rule::parse(&text(value()?)?).map_err(|said| Error::of_flag(&flag, said))?;
                    config.allow.push(rule);
                }
                "--base-url" => config.base_url = Some(text(value()?)?),
                "--ca" => config.ca = Some(value()?.into()),
                "--allow-insecure-loopback" => config.allow_insecure_loopback = true,
                "--api-key-file" => one(&mut config.api_key, &flag, Place::File(value()?.into()))?,
                "--api-key-env" => one(&mut config.api_key, &flag, Place::Variable(text(value()?)?))?,
                "--jwt-file" => one(&mut config.jwt, &flag, Place::File(value()?.into()))?,
                "--jwt-env" => one(&mut config.jwt, &flag, Place::Variable(text(value()?)?))?,
                "--token-url" => one(&mut config.jwt, &flag, Place::Endpoint(text(value()?)?))?,
                "--jwt-path" => {
                    let prefix = text(value()?)?;
                    rules::check_prefix(&prefix).map_err(|said| Error::of_flag(&flag, said))?;
                    config.jwt_paths.push(prefix);
                }
                "--log" => {
                    config.log = text(value()?)?
                        .parse()
                        .map_err(|_| Error::of_flag(&flag, "is none of off, error, warn, info, debug"))?;
                }
                "--api-key" | "--jwt" | "--client-secret" | "--client-token" => {
                    return Err(Error::of_flag(
                        &flag,
                        "a secret is no argument, as every user of the machine sees those; see --help",
                    ));
                }
                _ => return Err(Error::new(format!("{flag} is not a flag; see --help"))),
            }
            given.push(flag);
        }
        let jwts = [env::SELAM_JWT, env::SELAM_JWT_FILE, env::SELAM_TOKEN_URL];
        config.has_jwt = config.jwt.is_some() || jwts.into_iter().any(&is_set);
        config.check()?;
        Ok(Self::Serve(Box::new(config)))
    }
}

impl Config {
    /// What no flag is to blame for alone.
    fn check(&self) -> Result<(), Error> {
        if self.client_token_file.is_none() && !self.is_local() {
            return Err(Error::of_flag(
                "--listen",
                format!(
                    "{} is not a loopback address: say who may call by --client-token-file FILE",
                    self.listen
                ),
            ));
        }
        if !self.jwt_paths.is_empty() && !self.has_jwt {
            return Err(Error::of_flag(
                "--jwt-path",
                format!(
                    "there is no JWT: set {}, {} or {}",
                    env::SELAM_JWT,
                    env::SELAM_JWT_FILE,
                    env::SELAM_TOKEN_URL
                ),
            ));
        }
        Ok(())
    }

    /// Whether nobody but this machine's own programs can reach the proxy.
    pub fn is_local(&self) -> bool {
        self.listen.ip().to_canonical().is_loopback()
    }

    /// Whether requests to this path get the JWT.
    pub fn sends_jwt(&self, path: &str) -> bool {
        let covers = |prefix: &String| rules::is_below(path, prefix);
        self.has_jwt && (self.jwt_paths.is_empty() || self.jwt_paths.iter().any(covers))
    }

    /// The layers, with the credentials and the base URL that the flags name, or else the environment.
    ///
    /// `builder` has the client that asks the token endpoint.
    ///
    /// # Errors
    ///
    /// When a credential is missing or no good.
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
            builder = builder.with_base_url(parsed.map_err(|error| refused(Some("--base-url"), &error))?);
        }
        if let Some(place) = &self.api_key {
            builder = builder.with_api_key(load("--api-key-file", place, ApiKey::from_env_var)?);
        }
        match &self.jwt {
            Some(Place::Endpoint(url)) => builder = builder.with_token_url(url),
            Some(place) => builder = builder.with_jwt(load("--jwt-file", place, Token::from_env_var)?),
            None => {}
        }
        builder.build_with_env().map_err(|error| {
            let by_flag = matches!(self.jwt, Some(Place::Endpoint(_))) && error.env_var().is_none();
            refused(by_flag.then_some("--token-url"), &error)
        })
    }
}

/// What is wrong with what the library was given, and what to do about it where that is not plain.
fn refused(flag: Option<&str>, error: &ConfigError) -> Error {
    let hint = match (error.kind(), error.env_var()) {
        (ConfigErrorKind::Missing, Some(env::SELAM_API_KEY)) => {
            "; or name a file with it by SELAM_API_KEY_FILE or --api-key-file"
        }
        (ConfigErrorKind::NotHttps, _) => "; --allow-insecure-loopback lets it be http on this machine",
        _ => "",
    };
    let said = format!("{error}{hint}");
    match flag {
        Some(flag) => Error::of_flag(flag, said),
        None => Error(said),
    }
}

fn load<C: Credential>(
    flag: &str,
    place: &Place,
    from_variable: fn(&str) -> Result<C, ConfigError>,
) -> Result<Provider<C>, Error> {
    match place {
        Place::File(path) => {
            let source = FileSource::new(path);
            // A file that is no good is better known now.
            source.read().map_err(|error| refused(Some(flag), &error))?;
            Ok(Provider::Refreshing(Refreshing::new(source)))
        }
        Place::Variable(name) | Place::Endpoint(name) => {
            from_variable(name).map(Provider::Fixed).map_err(|error| refused(None, &error))
        }
    }
}

/// Without the value, which may be a secret that lost its flag.
fn unexpected(error: lexopt::Error) -> Error {
    match error {
        lexopt::Error::UnexpectedValue { option, .. } => Error::of_flag(&option, "takes no value"),
        _ => Error::new("an argument cannot be read; see --help"),
    }
}

fn address(value: &str) -> Result<SocketAddr, Error> {
    let wrong = |said: &dyn fmt::Display| Error::of_flag("--listen", format!("{value:?} {said}"));
    match value.to_socket_addrs() {
        Ok(mut addresses) => addresses.next().ok_or_else(|| wrong(&"has no address")),
        Err(_) => Err(wrong(&"is not ADDRESS:PORT, as 127.0.0.1:8080 is")),
    }
}

fn one(slot: &mut Option<Place>, flag: &str, place: Place) -> Result<(), Error> {
    match slot.replace(place) {
        None => Ok(()),
        Some(_) => Err(Error::of_flag(flag, "is given beside another flag of the same meaning")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &str, set: &[&str]) -> Result<Command, Error> {
        Command::parse(arguments.split_whitespace().map(OsString::from), |name| set.contains(&name))
    }

    fn config(arguments: &str, set: &[&str]) -> Config {
        match parse(arguments, set).unwrap() {
            Command::Serve(config) => *config,
            Command::Help => panic!("{arguments}"),
        }
    }

    #[test]
    fn flags_are_read_in_each_spelling() {
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
        assert_eq!(config.api_key, Some(Place::File("key".into())));
        assert_eq!(config.jwt, Some(Place::Endpoint("https://x/y".to_owned())));
        assert_eq!(config.log, tracing::level_filters::LevelFilter::DEBUG);
        assert!(config.has_jwt && config.allow_insecure_loopback && config.is_local());
        for help in ["-h", "--help", "--listen 127.0.0.1:1 --help"] {
            assert!(matches!(parse(help, &[]), Ok(Command::Help)), "{help}");
        }
    }

    #[test]
    fn without_flags_it_listens_on_loopback_and_the_environment_counts() {
        let plain = config("", &[]);
        assert_eq!(plain.listen.to_string(), "127.0.0.1:8080");
        assert!(!plain.has_jwt && plain.is_local() && plain.allow.is_empty());
        for variable in ["SELAM_JWT", "SELAM_JWT_FILE", "SELAM_TOKEN_URL"] {
            assert!(config("--jwt-path /v1/audio", &[variable]).has_jwt, "{variable}");
        }
    }

    #[test]
    fn jwts_go_where_they_are_sent_and_what_is_below() {
        let sends = |flags: &str, set: &[&str], path| config(flags, set).sends_jwt(path);
        assert!(!sends("", &[], "/v1/audio"));
        assert!(sends("", &["SELAM_JWT"], "/v1/chat/completions"));
        for (path, expected) in
            [("/v1/audio", true), ("/v1/audio/speech", true), ("/v1/audiobooks", false), ("/v1/chat", false)]
        {
            assert_eq!(sends("--jwt-path /v1/audio", &["SELAM_JWT"], path), expected, "{path}");
        }
    }

    #[test]
    fn only_loopback_is_listened_on_for_everybody() {
        for listen in ["127.0.0.1:0", "127.1.2.3:80", "[::1]:80", "[::ffff:127.0.0.1]:80", "localhost:80"] {
            assert!(parse(&format!("--listen {listen}"), &[]).is_ok(), "{listen}");
        }
        for listen in ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "128.0.0.1:80"] {
            let error = parse(&format!("--listen {listen}"), &[]).unwrap_err().to_string();
            assert!(error.contains(listen) && error.contains("--client-token-file"), "{error}");
            assert!(parse(&format!("--listen {listen} --client-token-file x"), &[]).is_ok(), "{listen}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_named_and_no_value_is_shown() {
        for (arguments, expected) in [
            ("--nonsense", "--nonsense is not a flag; see --help"),
            ("-x", "invalid option '-x'; see --help"),
            ("sk-selam-s3cr3t", "an argument belongs to no flag; see --help"),
            ("--allow-insecure-loopback=s3cr3t", "--allow-insecure-loopback: takes no value"),
            ("--listen", "--listen: needs a value"),
            ("--api-key-file=", "--api-key-file: is empty"),
            ("--listen nowhere", "--listen: \"nowhere\" is not ADDRESS:PORT, as 127.0.0.1:8080 is"),
            ("--ca a --ca b", "--ca: is given twice"),
            (
                "--api-key-file a --api-key-env B",
                "--api-key-env: is given beside another flag of the same meaning",
            ),
            (
                "--jwt-file a --token-url https://s3cr3t",
                "--token-url: is given beside another flag of the same meaning",
            ),
            (
                "--allow /v1/models",
                "--allow: \"/v1/models\" is not METHOD:PATH, as POST:/v1/chat/completions is",
            ),
            ("--jwt-path /audio", "--jwt-path: \"/audio\" is not below /v1, where all is that can be called"),
            (
                "--jwt-path /v1/audio",
                "--jwt-path: there is no JWT: set SELAM_JWT, SELAM_JWT_FILE or SELAM_TOKEN_URL",
            ),
            ("--log loud", "--log: is none of off, error, warn, info, debug"),
            (
                "--api-key sk-selam-s3cr3t",
                "--api-key: a secret is no argument, as every user of the machine sees those; see --help",
            ),
        ] {
            let error = parse(arguments, &[]).unwrap_err().to_string();
            assert_eq!(error, expected);
            assert!(!error.contains("s3cr3t") && !error.contains('\n'));
        }
    }

    #[test]
    fn what_the_library_refuses_is_told_with_its_flag_and_a_way_out() {
        let layer = |flags: &str| config(flags, &[]).layer(SelamLayer::builder()).unwrap_err().to_string();
        assert_eq!(
            layer("--base-url http://127.0.0.1:1/v1 --api-key-file x"),
            "--base-url: base URL is not https; --allow-insecure-loopback lets it be http on this machine"
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
    fn the_help_names_every_flag_and_fits_a_terminal() {
        for flag in [
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
            "--log",
            "--help",
        ] {
            assert!(HELP.contains(&format!("{flag} ")) || HELP.contains(&format!("{flag}\n")), "{flag}");
        }
        assert!(HELP.lines().all(|line| line.chars().count() <= 90));
    }
}
