//! The name of a user, in the extensions of a request.

use std::{borrow::Borrow, fmt, sync::Arc};

/// Names the user that a request is made for: the `sub` of a JWT, or any other name that a program has for its users
/// ([RFC 7519 section 4.1.2](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.2)).
///
/// In a request's extensions it selects the token that [`PerSubject`](crate::PerSubject) sends. It applies to that request alone:
/// if an outer layer drops it, as a redirect layer may, the next request is refused. A layer that has one token for all
/// subjects refuses a request that names one. Cheap to clone; not a secret, so `Debug` prints it. Like
/// [`RequestAuth`](crate::RequestAuth), it is found by its type, by layers of the same version of this crate.
///
/// ```
/// use http::Request;
/// use tower_selam::Subject;
///
/// let request = Request::post("https://api.selamgpt.com/v1/chat/completions").extension(Subject::new("user-7")).body(());
/// # assert_eq!(request.unwrap().extensions().get::<Subject>().unwrap().as_str(), "user-7");
/// ```
#[doc(alias("user", "sub", "tenant"))]
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject(Arc<str>);

impl Subject {
    /// Creates a subject from its name.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self(name.into())
    }

    /// Returns the name.
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
