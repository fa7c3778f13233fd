//! The name of a user, in the extensions of a request.

use std::{borrow::Borrow, fmt, sync::Arc};

/// Names a user: the `sub` of a JWT, or whatever a program calls its users by
/// ([RFC 7519 section 4.1.2](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.2)).
///
/// In a request's extensions, it says whose token the request is to have: see [`PerSubject`](crate::PerSubject). It holds for that request
/// alone; where a layer outside loses it, as one that follows redirects may, the request that follows is refused. A layer
/// that has one token for all refuses a request that names a subject. Cheap to clone; not a secret, so `Debug` shows it.
///
/// ```
/// use http::Request;
/// use tower_selam::Subject;
///
/// let request = Request::get("https://api.selamgpt.com/v1/models").extension(Subject::new("user-7")).body(());
/// # assert_eq!(request.unwrap().extensions().get::<Subject>().unwrap().as_str(), "user-7");
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject(Arc<str>);

impl Subject {
    /// The user of this name.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Subject {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Subject").field(&self.as_str()).finish()
    }
}
