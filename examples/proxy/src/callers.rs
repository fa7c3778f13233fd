//! Authenticates callers: by the tokens in the file named by `--client-token-file`, or by the JWTs of the app's
//! [login](crate::login): [`Callers`].
//!
//! ```text
//! # name:token
//! web:3b1fa5c0e2f94c2e
//! mobile:77aa90d1e3b64f08
//! ```

use std::{
    collections::HashMap,
    fmt::{self, Display},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::http::{HeaderMap, HeaderName, Uri, Version, header::AUTHORIZATION};
use secrecy::{ExposeSecret, SecretSlice};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tokio::{sync::watch, time};
use tower_selam::{ConfigErrorKind, inbound::WebSocketProtocols, source::SettledFile, verify::VerifyError};

use crate::{
    browsers::Origins,
    config, local,
    login::{Login, User},
    reply::Refusal,
};

/// How often the file is checked.
const RECHECK: Duration = Duration::from_millis(300);

/// The largest token file that is read.
const MAX_FILE_SIZE: usize = 1024 * 1024;

/// The longest name of a caller: names appear in every log line and metric.
const MAX_NAME_LENGTH: usize = 64;

/// Headers that may carry a token, in addition to `Authorization`.
const KEY_HEADERS: [HeaderName; 2] =
    [HeaderName::from_static("x-api-key"), HeaderName::from_static("api-key")];

/// How many of a request's tokens are looked at: each may cost the check of a signature.
const MAX_TOKENS: usize = 16;

/// A caller's name, for logs and metrics.
pub type Name = Arc<str>;

/// Who sent a request. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The name of the client token, or the group of the user.
    pub name: Name,
    /// The user, if a JWT tells of one.
    pub user: Option<Arc<User>>,
}

/// The callers that the proxy serves. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Callers {
    /// Callers with a token from the file.
    tokens: Option<watch::Receiver<TokenTable>>,
    /// Users of the app. Without either, every program on this machine is served, and every listed page.
    login: Option<Login>,
    pages: Origins,
}

impl Callers {
    /// Serves the callers in this file and the users of this login; without either, all programs on this machine and the pages of
    /// these origins.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or one of its lines is invalid.
    pub fn new(
        token_file: Option<PathBuf>,
        login: Option<Login>,
        pages: Origins,
    ) -> Result<Self, config::Error> {
        Ok(Self { tokens: token_file.map(follow_file).transpose()?, login, pages })
    }

    /// Returns who sent a request with this head.
    ///
    /// # Errors
    ///
    /// The reason to refuse the request.
    pub async fn identify(
        &self,
        version: Version,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Identity, Refusal> {
        if self.tokens.is_none() && self.login.is_none() {
            local::check(version, uri, headers, &self.pages)?;
            return Ok(Identity::named(Name::from("local")));
        }
        let protocols = WebSocketProtocols::from_headers(headers);
        let mut refusal = Refusal::MissingToken;
        for token in presented(headers).chain(protocols.tokens()).take(MAX_TOKENS) {
            match self.authenticate(token).await {
                Ok(identity) => return Ok(identity),
                // Of several tokens, the one that says most: most clients send the same token twice, or a key of their own.
                Err(next) if refusal.says_little() => refusal = next,
                Err(_) => {}
            }
        }
        // Some clients send the token alone as a subprotocol.
        let mut alone = protocols.offered().filter_map(|protocol| self.find(protocol));
        alone.next().map(Identity::named).ok_or(refusal)
    }

    /// Returns whose token this is: a client token or a JWT, without `Bearer`. The only place that decides it.
    ///
    /// # Errors
    ///
    /// The reason to refuse the request.
    pub async fn authenticate(&self, token: &[u8]) -> Result<Identity, Refusal> {
        if let Some(name) = self.find(token) {
            return Ok(Identity::named(name));
        }
        match &self.login {
            Some(login) if Login::is_jwt(token) => login.authenticate(token).await,
            // Nobody has a client token.
            Some(_) if self.tokens.is_none() => Err(Refusal::InvalidJwt(VerifyError::Malformed)),
            _ => Err(Refusal::InvalidToken),
        }
    }

    /// Whether this is a client token, or may be a user's JWT.
    pub fn may_know(&self, token: &[u8]) -> bool {
        self.find(token).is_some()
            || (self.login.is_some() && Login::is_jwt(token) && token.starts_with(b"ey"))
    }

    /// The name of the client token.
    fn find(&self, token: &[u8]) -> Option<Name> {
        self.tokens.as_ref()?.borrow().find(token)
    }
}

impl Identity {
    fn named(name: Name) -> Self {
        Self { name, user: None }
    }
}

/// Reads the file, and re-reads it in the background when it changes.
fn follow_file(path: PathBuf) -> Result<watch::Receiver<TokenTable>, config::Error> {
    let file = SettledFile::new(path).with_max_size(MAX_FILE_SIZE);
    let content = file.read_blocking();
    let digest = digest(&content);
    let table =
        parse(&file, content).map_err(|error| config::Error::for_flag("--client-token-file", error))?;
    let (sender, receiver) = watch::channel(table);
    tokio::spawn(follow(file, digest, sender));
    Ok(receiver)
}

/// Whether callers may send their token in this header.
pub fn may_carry_token(name: &HeaderName) -> bool {
    *name == AUTHORIZATION || KEY_HEADERS.contains(name)
}

/// Every token in the headers. A caller written for the API itself may send two: a JWT as bearer, and a key.
fn presented(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let bearer = headers.get_all(AUTHORIZATION).iter().filter_map(|value| {
        let (scheme, token) = value.as_bytes().split_at_checked(b"bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
    });
    let bare = KEY_HEADERS
        .into_iter()
        .flat_map(|name| headers.get_all(name))
        .map(|value| value.as_bytes().trim_ascii());
    bearer.chain(bare).filter(|token| !token.is_empty())
}

/// The callers' names, each with the digest of its token.
#[derive(Clone, Default)]
pub struct TokenTable(Vec<(Name, [u8; 32])>);

impl TokenTable {
    /// Parses `name:token` lines.
    ///
    /// # Errors
    ///
    /// The first invalid line, without its content.
    pub fn parse(content: &[u8]) -> Result<Self, BadLine> {
        let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
        let mut table: Vec<(Name, [u8; 32])> = Vec::new();
        let mut names: HashMap<Name, usize> = HashMap::new();
        let mut tokens: HashMap<[u8; 32], usize> = HashMap::new();
        for (index, line) in content.split(|byte| *byte == b'\n').enumerate() {
            let number = index + 1;
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let invalid = |fault| BadLine { number: Some(number), fault };
            let colon = line.iter().position(|byte| *byte == b':').ok_or_else(|| invalid(Fault::NoColon))?;
            let (name, token) = (line[..colon].trim_ascii(), line[colon + 1..].trim_ascii());
            let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
            if name.is_empty() || name.len() > MAX_NAME_LENGTH || !name.iter().all(is_name) {
                return Err(invalid(Fault::BadName));
            }
            let name = Name::from(&*String::from_utf8_lossy(name));
            if token.is_empty() {
                return Err(invalid(Fault::NoToken(name)));
            }
            if !token.iter().all(u8::is_ascii_graphic) {
                return Err(invalid(Fault::BadToken(name)));
            }
            let digest = Sha256::digest(token).into();
            if let Some(first) = names.insert(name.clone(), number) {
                return Err(invalid(Fault::SameName(name, first)));
            }
            if let Some(first) = tokens.insert(digest, number) {
                return Err(invalid(Fault::SameToken(name, first)));
            }
            table.push((name, digest));
        }
        if table.is_empty() {
            return Err(BadLine { number: None, fault: Fault::NoCallers });
        }
        Ok(Self(table))
    }

    /// Returns the name of the caller with this token, in constant time: all entries are compared, by digests of one length.
    fn find(&self, token: &[u8]) -> Option<Name> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        let mut found = u32::MAX;
        for (index, (_, known)) in (0..).zip(&self.0) {
            found.conditional_assign(&index, known.ct_eq(&digest));
        }
        self.0.get(usize::try_from(found).ok()?).map(|(name, _)| name.clone())
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// An invalid line of the file, or a file without any entry. Never contains a token.
#[derive(Debug, PartialEq, Eq)]
pub struct BadLine {
    number: Option<usize>,
    fault: Fault,
}

#[derive(Debug, PartialEq, Eq)]
enum Fault {
    NoColon,
    BadName,
    NoToken(Name),
    BadToken(Name),
    SameName(Name, usize),
    SameToken(Name, usize),
    NoCallers,
}

impl Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(number) = self.number {
            write!(f, "line {number}: ")?;
        }
        match &self.fault {
            Fault::NoColon => f.write_str("expected name:token"),
            Fault::BadName => {
                write!(f, "the name must be 1 to {MAX_NAME_LENGTH} letters, digits, '-', '_' or '.'")
            }
            Fault::NoToken(name) => write!(f, "the token of {name:?} is empty"),
            Fault::BadToken(name) => {
                write!(f, "the token of {name:?} must consist of visible ASCII characters")
            }
            Fault::SameName(name, first) => write!(f, "{name:?} duplicates the name on line {first}"),
            Fault::SameToken(name, first) => {
                write!(f, "the token of {name:?} duplicates the token on line {first}")
            }
            Fault::NoCallers => f.write_str("contains no name:token line, so nobody could call"),
        }
    }
}

type Content = Result<SecretSlice<u8>, ConfigErrorKind>;

type Digested = Result<[u8; 32], ConfigErrorKind>;

fn digest(content: &Content) -> Digested {
    let content = content.as_ref().map_err(Clone::clone)?;
    Ok(Sha256::digest(content.expose_secret()).into())
}

fn parse(file: &SettledFile, content: Content) -> Result<TokenTable, String> {
    let named = |error: &dyn Display| format!("{}: {error}", file.path().display());
    let content = content.map_err(|error| named(&error))?;
    TokenTable::parse(content.expose_secret()).map_err(|error| named(&error))
}

/// Re-reads the file whenever it changes, until all receivers are gone. An invalid file leaves the table as it is.
async fn follow(file: SettledFile, mut current: Digested, sender: watch::Sender<TokenTable>) {
    let mut previous = current.clone();
    // The rejected state that the log has already mentioned.
    let mut reported = None;
    let mut ticks = time::interval(RECHECK);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = sender.closed() => return,
        }
        let content = file.read().await;
        let digest = digest(&content);
        // A file that is missing for a moment is being replaced.
        let is_passing = digest.is_err() && digest != previous;
        previous = digest.clone();
        if digest == current {
            reported = None;
            continue;
        }
        if is_passing || reported.as_ref() == Some(&digest) {
            continue;
        }
        match parse(&file, content) {
            Ok(table) => {
                tracing::info!(callers = table.len(), "client tokens reloaded");
                sender.send_replace(table);
                current = digest.clone();
            }
            Err(error) => tracing::error!(%error, "client tokens not reloaded, keeping the previous ones"),
        }
        reported = Some(digest);
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn table(content: &str) -> Result<TokenTable, String> {
        TokenTable::parse(content.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn files_of_any_editor_are_parsed() {
        let table =
            table("\u{feff}# who may call\r\n\r\nweb:s3cr3t\r\n  mobile : with:colon \n\nlast-one.2:x")
                .unwrap();
        assert_eq!(table.find(b"s3cr3t").as_deref(), Some("web"));
        assert_eq!(table.find(b"with:colon").as_deref(), Some("mobile"));
        assert_eq!(table.find(b"x").as_deref(), Some("last-one.2"));
        for token in ["", "s3cr3", "s3cr3t ", "S3CR3T", "web", "web:s3cr3t", "# who may call"] {
            assert_eq!(table.find(token.as_bytes()), None, "{token:?}");
        }
    }

    #[test]
    fn an_invalid_line_is_named_but_never_shown() {
        for (content, expected) in [
            ("", "contains no name:token line, so nobody could call"),
            ("# web:s3cr3t\n\n", "contains no name:token line, so nobody could call"),
            ("# tokens\ns3cr3t", "line 2: expected name:token"),
            ("web:a\nweb:s3cr3t", "line 2: \"web\" duplicates the name on line 1"),
            ("web:s3cr3t\n\napp:s3cr3t", "line 3: the token of \"app\" duplicates the token on line 1"),
            ("web:\n", "line 1: the token of \"web\" is empty"),
            ("web: \r\n", "line 1: the token of \"web\" is empty"),
            ("web:s3cr3t more", "line 1: the token of \"web\" must consist of visible ASCII characters"),
            ("web:s3cr3té", "line 1: the token of \"web\" must consist of visible ASCII characters"),
            (":s3cr3t", "line 1: the name must be 1 to 64 letters, digits, '-', '_' or '.'"),
            ("s3cr3t/x:web", "line 1: the name must be 1 to 64 letters, digits, '-', '_' or '.'"),
        ] {
            let error = table(content).unwrap_err();
            assert_eq!(error, expected);
            assert!(!error.contains("s3cr3t"));
        }
        assert!(table(&format!("{}:x", "n".repeat(65))).is_err());
        assert!(!format!("{:?}", table("web:s3cr3t").unwrap()).contains("s3cr3t"));
    }

    #[tokio::test]
    async fn each_header_may_carry_the_token() {
        let (_sender, receiver) = watch::channel(table("web:s3cr3t").unwrap());
        let callers = Callers { tokens: Some(receiver), login: None, pages: Origins::new(Vec::new()) };
        let find = async |headers: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(*name, HeaderValue::from_static(value));
            }
            let uri = Uri::from_static("/v1");
            callers.identify(Version::HTTP_11, &uri, &map).await.map(|identity| identity.name)
        };
        let web = Ok(Name::from("web"));
        for headers in [
            &[("authorization", "Bearer s3cr3t")][..],
            &[("authorization", "bearer  s3cr3t")],
            &[("x-api-key", "s3cr3t")],
            &[("api-key", "s3cr3t")],
            &[("authorization", "Bearer a.jwt"), ("x-api-key", "s3cr3t")],
            &[("sec-websocket-protocol", "realtime, openai-insecure-api-key.s3cr3t")],
            &[("sec-websocket-protocol", "bearer.s3cr3t")],
            &[("sec-websocket-protocol", "realtime"), ("sec-websocket-protocol", "s3cr3t")],
        ] {
            assert_eq!(find(headers).await, web, "{headers:?}");
        }
        for headers in [
            &[("authorization", "Bearer wrong")][..],
            &[("x-api-key", "wrong")],
            &[("authorization", "Bearer web:s3cr3t")],
            &[("sec-websocket-protocol", "bearer.wrong")],
        ] {
            assert_eq!(find(headers).await, Err(Refusal::InvalidToken), "{headers:?}");
        }
        for headers in [
            &[][..],
            &[("authorization", "Bearer ")],
            &[("authorization", "Basic s3cr3t")],
            &[("authorization", "s3cr3t")],
            &[("cookie", "token=s3cr3t")],
            &[("x-api-key", "")],
            &[("sec-websocket-protocol", "realtime")],
        ] {
            assert_eq!(find(headers).await, Err(Refusal::MissingToken), "{headers:?}");
        }
    }

    #[tokio::test]
    async fn only_valid_changes_take_effect() {
        let path = std::env::temp_dir().join(format!("selam-proxy-callers-{}", std::process::id()));
        std::fs::write(&path, "web:first").unwrap();
        let mut table = follow_file(path.clone()).unwrap();
        assert!(table.borrow_and_update().find(b"first").is_some());

        std::fs::write(&path, "web:second").unwrap();
        table.changed().await.unwrap();
        assert!(table.borrow_and_update().find(b"first").is_none());
        assert!(table.borrow_and_update().find(b"second").is_some());

        std::fs::write(&path, "web").unwrap();
        let next = time::timeout(5 * RECHECK, table.changed()).await;
        assert!(next.is_err() && table.borrow().find(b"second").is_some());
        std::fs::remove_file(&path).unwrap();
        let error = follow_file(path.clone()).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("--client-token-file: {}: cannot be read: entity not found", path.display())
        );
    }
}
