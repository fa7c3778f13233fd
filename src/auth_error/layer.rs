use std::time::Duration;

use tower_layer::Layer;

use super::{AnnotateAuthError, MapAuthError, inspect::Bounds};

/// Makes a 401 or 403 an [`AuthError`](crate::AuthError). See the [module docs](super).
#[derive(Clone, Copy, Debug, Default)]
pub struct AuthErrorLayer(pub(crate) Bounds);

/// Puts an [`AuthError`](crate::AuthError) into the extensions of a 401 or 403 and lets it pass. See the
/// [module docs](super).
///
/// ```
/// use http::{Request, Response, StatusCode};
/// use http_body_util::{BodyExt, Full};
/// use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
/// use tower_selam::{AnnotateAuthErrorLayer, AuthError, AuthErrorKind, BoxError};
///
/// # tokio_test::block_on(async {
/// let body = r#"{"error":{"message":"No API key provided.","code":"missing_api_key"}}"#;
/// let api = service_fn(|_: Request<()>| async move {
///     Ok::<_, BoxError>(Response::builder().status(401).body(Full::<bytes::Bytes>::from(body))?)
/// });
/// let service = ServiceBuilder::new().layer(AnnotateAuthErrorLayer::new()).service(api);
///
/// let response = service.oneshot(Request::new(())).await?;
/// assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
/// let error: &AuthError = response.extensions().get().unwrap();
/// assert_eq!(error.kind(), AuthErrorKind::MissingApiKey);
/// assert_eq!(response.into_body().collect().await?.to_bytes(), body);
/// # Ok::<(), BoxError>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct AnnotateAuthErrorLayer(Bounds);

macro_rules! settings {
    ($layer:ident, $service:ident) => {
        impl $layer {
            /// Reads up to 64 KiB of an error body, for 5 seconds at most.
            #[must_use]
            pub fn new() -> Self {
                Self::default()
            }

            /// Reads up to `bytes` of an error body.
            #[must_use]
            pub fn with_body_limit(mut self, bytes: usize) -> Self {
                self.0.size = bytes;
                self
            }

            /// Reads an error body for `time` at most.
            #[must_use]
            pub fn with_body_timeout(mut self, time: Duration) -> Self {
                self.0.time = time;
                self
            }
        }

        impl<S> Layer<S> for $layer {
            type Service = $service<S>;

            fn layer(&self, inner: S) -> Self::Service {
                $service::new(inner, self.0)
            }
        }
    };
}

settings!(AuthErrorLayer, MapAuthError);
settings!(AnnotateAuthErrorLayer, AnnotateAuthError);
