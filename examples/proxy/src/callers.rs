//! Who may call: [`Callers`], the tokens in the file that `--client-token-file` names.
//!
//! ```text
//! # name:token
//! web:3b1fa5c0e2f94c2e
//! mobile:77aa90d1e3b64f08
//! ```

use std::{
    collections::HashMap,
    fmt::{self, Display},
    io::Read,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::http::{
    HeaderMap, HeaderName, Uri,
    header::{AUTHORIZATION, ORIGIN},
};
use sha2::{Digest, Sha256};
use subtle::{ConditionallySelectable, ConstantTimeEq};
use tokio::{sync::watch, time};

use crate::config;

/// How often the file is looked at. What has changed in it counts when it is found so twice: it may be half written.
const RECHECK: Duration = Duration::from_millis(300);

/// No list of callers is longer.
const LIMIT: u64 = 1024 * 1024;

/// Longer names would be a nuisance in logs and metrics.
const LONGEST_NAME: usize = 64;

/// Headers that a token may come in, beside `Authorization`.
const KEY_HEADERS: [HeaderName; 2] =
    [HeaderName::from_static("x-api-key"), HeaderName::from_static("api-key")];

/// A caller's name, for logs and metrics.
pub type Name = Arc<str>;

/// Who may call. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Callers {
    /// Everybody who can reach the proxy: this machine's own programs.
    Anyone(Name),
    /// Who has one of these tokens.
    Known(watch::Receiver<Table>),
}

/// What a request's token says of its caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    Known(Name),
    /// There is a token, and it is nobody's.
    Unknown,
    /// There is no token.
    Silent,
    /// Somebody's web page, in a browser on this machine.
    Foreign,
}

impl Callers {
    /// Everybody, by the name of `local`.
    pub fn anyone() -> Self {
        Self::Anyone(Name::from("local"))
    }

    /// Those in the file, which is read now and then again, on a task of its own, when it changes.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or a line of it is no good.
    pub fn from_file(path: PathBuf) -> Result<Self, config::Error> {
        let content = read(&path).map_err(|error| config::Error::of_flag("--client-token-file", error))?;
        let table = Table::parse(&content).map_err(|error| {
            config::Error::of_flag("--client-token-file", Unreadable { path: path.clone(), error })
        })?;
        let digest = Sha256::digest(&content).into();
        let (sender, receiver) = watch::channel(table);
        tokio::spawn(follow(path, digest, sender));
        Ok(Self::Known(receiver))
    }

    /// Who sends these headers.
    pub fn find(&self, headers: &HeaderMap) -> Caller {
        match self {
            Self::Anyone(_) if is_foreign(headers) => Caller::Foreign,
            Self::Anyone(name) => Caller::Known(name.clone()),
            Self::Known(table) => {
                let mut found = Caller::Silent;
                for token in presented(headers) {
                    match table.borrow().find(token) {
                        Some(name) => return Caller::Known(name),
                        None => found = Caller::Unknown,
                    }
                }
                found
            }
        }
    }
}

/// Every token in the headers. A caller that speaks to the API itself in the same way may send a JWT as the bearer and the
/// key beside it.
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

/// Whether a web page sends this that does not come from this machine: a browser says so, and would send it for any page
/// that its user looks at.
fn is_foreign(headers: &HeaderMap) -> bool {
    headers.get_all(ORIGIN).iter().any(|origin| {
        let origin = origin.to_str().ok().and_then(|origin| origin.parse::<Uri>().ok());
        let host = origin.as_ref().and_then(Uri::host).unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        !(host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback()))
    })
}

/// Names, and the digests of their tokens.
#[derive(Clone, Default)]
pub struct Table(Vec<(Name, [u8; 32])>);

impl Table {
    /// Reads `name:token` lines.
    ///
    /// # Errors
    ///
    /// At the first line that is no good; the error does not show it.
    pub fn parse(content: &[u8]) -> Result<Self, BadLine> {
        let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
        let mut table: Vec<(Name, [u8; 32])> = Vec::new();
        let mut names: HashMap<Name, usize> = HashMap::new();
        let mut tokens: HashMap<[u8; 32], usize> = HashMap::new();
        for (at, line) in content.split(|byte| *byte == b'\n').enumerate() {
            let number = at + 1;
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let wrong = |fault| BadLine { number: Some(number), fault };
            let colon = line.iter().position(|byte| *byte == b':').ok_or_else(|| wrong(Fault::NoColon))?;
            let (name, token) = (line[..colon].trim_ascii(), line[colon + 1..].trim_ascii());
            let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
            if name.is_empty() || name.len() > LONGEST_NAME || !name.iter().all(is_name) {
                return Err(wrong(Fault::BadName));
            }
            let name = Name::from(&*String::from_utf8_lossy(name));
            if token.is_empty() {
                return Err(wrong(Fault::NoToken(name)));
            }
            if !token.iter().all(u8::is_ascii_graphic) {
                return Err(wrong(Fault::BadToken(name)));
            }
            let digest = Sha256::digest(token).into();
            if let Some(first) = names.insert(name.clone(), number) {
                return Err(wrong(Fault::SameName(name, first)));
            }
            if let Some(first) = tokens.insert(digest, number) {
                return Err(wrong(Fault::SameToken(name, first)));
            }
            table.push((name, digest));
        }
        if table.is_empty() {
            return Err(BadLine { number: None, fault: Fault::Nobody });
        }
        Ok(Self(table))
    }

    /// Whose token it is. Takes the same time for every token: all are compared, by digests of one length.
    fn find(&self, token: &[u8]) -> Option<Name> {
        let digest: [u8; 32] = Sha256::digest(token).into();
        let mut found = u32::MAX;
        for (at, (_, known)) in (0..).zip(&self.0) {
            found.conditional_assign(&at, known.ct_eq(&digest));
        }
        self.0.get(usize::try_from(found).ok()?).map(|(name, _)| name.clone())
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(name, _)| name)).finish()
    }
}

/// What is wrong with the file, and in which line; without the token.
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
    Nobody,
}

impl Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(number) = self.number {
            write!(f, "line {number}: ")?;
        }
        match &self.fault {
            Fault::NoColon => f.write_str("is not name:token"),
            Fault::BadName => {
                write!(f, "the name is not 1 to {LONGEST_NAME} letters, digits, '-', '_' or '.'")
            }
            Fault::NoToken(name) => write!(f, "the token of {name:?} is empty"),
            Fault::BadToken(name) => {
                write!(f, "the token of {name:?} has blanks or characters that are not ASCII")
            }
            Fault::SameName(name, first) => write!(f, "the name {name:?} is that of line {first}"),
            Fault::SameToken(name, first) => write!(f, "the token of {name:?} is that of line {first}"),
            Fault::Nobody => f.write_str("there is no name:token in it, so nobody could call"),
        }
    }
}

struct Unreadable<E> {
    path: PathBuf,
    error: E,
}

impl<E: Display> Display for Unreadable<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.error)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let unreadable = |error: std::io::Error| format!("{}: cannot be read: {}", path.display(), error.kind());
    let mut content = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(LIMIT + 1).read_to_end(&mut content).map_err(unreadable)?;
    if content.len() as u64 > LIMIT {
        return Err(format!("{}: is longer than 1 MiB", path.display()));
    }
    Ok(content)
}

/// Reads the file again when it changes, as long as anybody wants to know. A change for the worse changes nothing.
async fn follow(path: PathBuf, mut current: [u8; 32], sender: watch::Sender<Table>) {
    let mut last = Ok(current);
    let mut ticks = time::interval(RECHECK);
    ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = sender.closed() => return,
        }
        let looking = path.clone();
        let Ok(content) = tokio::task::spawn_blocking(move || read(&looking)).await else { continue };
        let digest: Result<[u8; 32], String> = match &content {
            Ok(content) => Ok(Sha256::digest(content).into()),
            Err(error) => Err(error.clone()),
        };
        let settled = digest == last;
        last = digest.clone();
        if digest == Ok(current) {
            told = None;
        } else if settled && told.as_ref() != Some(&digest) {
            let parse = |content: Vec<u8>| {
                Table::parse(&content).map_err(|error| format!("{}: {error}", path.display()))
            };
            match (content.and_then(parse), &digest) {
                (Ok(table), Ok(digest)) => {
                    current = *digest;
                    tracing::info!(callers = table.len(), "the client tokens have changed");
                    sender.send_replace(table);
                }
                (Err(error), _) => tracing::error!(%error, "the client tokens stay as they were"),
                (Ok(_), Err(_)) => {}
            }
            told = Some(digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn table(content: &str) -> Result<Table, String> {
        Table::parse(content.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_is_read_whatever_wrote_it() {
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
    fn a_bad_line_is_named_by_its_number_and_never_shown() {
        for (content, expected) in [
            ("", "there is no name:token in it, so nobody could call"),
            ("# web:s3cr3t\n\n", "there is no name:token in it, so nobody could call"),
            ("# tokens\ns3cr3t", "line 2: is not name:token"),
            ("web:a\nweb:s3cr3t", "line 2: the name \"web\" is that of line 1"),
            ("web:s3cr3t\n\napp:s3cr3t", "line 3: the token of \"app\" is that of line 1"),
            ("web:\n", "line 1: the token of \"web\" is empty"),
            ("web: \r\n", "line 1: the token of \"web\" is empty"),
            ("web:s3cr3t more", "line 1: the token of \"web\" has blanks or characters that are not ASCII"),
            ("web:s3cr3té", "line 1: the token of \"web\" has blanks or characters that are not ASCII"),
            (":s3cr3t", "line 1: the name is not 1 to 64 letters, digits, '-', '_' or '.'"),
            ("s3cr3t/x:web", "line 1: the name is not 1 to 64 letters, digits, '-', '_' or '.'"),
        ] {
            let error = table(content).unwrap_err();
            assert_eq!(error, expected);
            assert!(!error.contains("s3cr3t"));
        }
        assert!(table(&format!("{}:x", "n".repeat(65))).is_err());
        assert!(!format!("{:?}", table("web:s3cr3t").unwrap()).contains("s3cr3t"));
    }

    #[test]
    fn a_token_is_found_in_each_header_it_may_come_in() {
        let (_sender, receiver) = watch::channel(table("web:s3cr3t").unwrap());
        let callers = Callers::Known(receiver);
        let find = |headers: &[(&'static str, &'static str)]| {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(*name, HeaderValue::from_static(value));
            }
            callers.find(&map)
        };
        let web = Caller::Known(Name::from("web"));
        for headers in [
            &[("authorization", "Bearer s3cr3t")][..],
            &[("authorization", "bearer  s3cr3t")],
            &[("x-api-key", "s3cr3t")],
            &[("api-key", "s3cr3t")],
            &[("authorization", "Bearer a.jwt"), ("x-api-key", "s3cr3t")],
        ] {
            assert_eq!(find(headers), web, "{headers:?}");
        }
        for headers in [
            &[("authorization", "Bearer wrong")][..],
            &[("x-api-key", "wrong")],
            &[("authorization", "Bearer web:s3cr3t")],
        ] {
            assert_eq!(find(headers), Caller::Unknown, "{headers:?}");
        }
        for headers in [
            &[][..],
            &[("authorization", "Bearer ")],
            &[("authorization", "Basic s3cr3t")],
            &[("authorization", "s3cr3t")],
            &[("cookie", "token=s3cr3t")],
            &[("x-api-key", "")],
        ] {
            assert_eq!(find(headers), Caller::Silent, "{headers:?}");
        }
    }

    #[test]
    fn without_tokens_no_page_of_another_machine_may_call() {
        let callers = Callers::anyone();
        let find = |origin| callers.find(&HeaderMap::from_iter([(ORIGIN, HeaderValue::from_static(origin))]));
        assert_eq!(callers.find(&HeaderMap::new()), Caller::Known(Name::from("local")));
        for origin in
            ["http://localhost:3000", "http://127.0.0.1:3000", "http://[::1]:3000", "https://LOCALHOST"]
        {
            assert_eq!(find(origin), Caller::Known(Name::from("local")), "{origin}");
        }
        for origin in [
            "https://evil.example",
            "http://127.0.0.1.evil.example",
            "http://localhost.evil.example",
            "null",
            "",
        ] {
            assert_eq!(find(origin), Caller::Foreign, "{origin}");
        }
    }

    #[tokio::test]
    async fn a_file_that_changes_is_read_again_and_a_bad_one_changes_nothing() {
        let path = std::env::temp_dir().join(format!("selam-proxy-callers-{}", std::process::id()));
        std::fs::write(&path, "web:first").unwrap();
        let callers = Callers::from_file(path.clone()).unwrap();
        let Callers::Known(mut table) = callers else { panic!("a file was given") };
        assert!(table.borrow_and_update().find(b"first").is_some());

        std::fs::write(&path, "web:second").unwrap();
        table.changed().await.unwrap();
        assert!(table.borrow_and_update().find(b"first").is_none());
        assert!(table.borrow_and_update().find(b"second").is_some());

        std::fs::write(&path, "web").unwrap();
        let next = time::timeout(5 * RECHECK, table.changed()).await;
        assert!(next.is_err() && table.borrow().find(b"second").is_some());
        std::fs::remove_file(&path).unwrap();
        let error = Callers::from_file(path.clone()).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("--client-token-file: {}: cannot be read: entity not found", path.display())
        );
    }
}
