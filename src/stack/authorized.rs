//! Requests of hosts that are not Tower services: [`Authorized`].

use std::{fmt, mem, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::AUTHORIZATION, request::Parts};

use super::SelamLayer;
use crate::{
    AuthError,
    auth_error::BodyLimits,
    authorize::{Policy, Sent, X_API_KEY},
    error::is_auth_status,
    refresh::WaitForRefresh,
    replay::{Blame, is_accepted},
    telemetry::event,
};

/// A request that carries the layer's credentials, in a host that is not a Tower service. Made by
/// [`SelamLayer::authorize`]; see [the guide](crate::guide::hosts).
///
/// Keep it until the API has answered, and hand it [each answer](Self::should_replay).
pub struct Authorized {
    policy: Arc<Policy>,
    limits: BodyLimits,
    sent: Sent,
    headers: [(HeaderName, Option<HeaderValue>); 2],
    progress: Progress,
}

/// How far a request has come.
enum Progress {
    /// A 401 may lead to a replay.
    First,
    /// It is being replayed, after a 401 that blamed this credential.
    Replay(Blame),
    /// It is not replayed, or not again.
    Last,
}

impl<R> SelamLayer<R> {
    /// Writes the credentials into a request's head, exactly as the layer does for a Tower client: it checks origin and
    /// method, obeys [`RequestAuth`](crate::RequestAuth) and [`Subject`](crate::Subject) in the extensions, and waits for a
    /// refresh if one is due. For [hosts that are not Tower services](crate::guide::hosts).
    ///
    /// The origin is that of the URI, and `Host` must match it. A head whose URI has a path only needs
    /// [`Origins::with_relative_uri_origin`](crate::Origins::with_relative_uri_origin).
    ///
    /// ```
    /// use http::Request;
    /// use tower_selam::{ApiKey, SelamLayer};
    ///
    /// # tokio_test::block_on(async {
    /// let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).build()?;
    /// let chat = layer.base_url().endpoint("chat/completions")?;
    /// let (mut head, ()) = Request::post(chat).body(())?.into_parts();
    ///
    /// layer.authorize(&mut head).await?;
    /// assert_eq!(head.headers["authorization"], "Bearer sk-selam-example");
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    ///
    /// As the layer's for a request that it does not send. The head then carries no credential of ours; do not send it.
    ///
    /// # Cancel safety
    ///
    /// The head stays as it is, and a refresh continues without its caller.
    pub async fn authorize(&self, head: &mut Parts) -> Result<Authorized, AuthError> {
        let (policy, limits) = (Arc::clone(&self.policy), self.errors.limits());
        let sent = policy.authorize_head(head).await?;
        let headers = written(head);
        Ok(Authorized { policy, limits, sent, headers, progress: Progress::First })
    }
}

impl Authorized {
    /// Reports the API's answer, and returns whether to replay the request: call
    /// [`authorize_again`](Self::authorize_again) then, and send it once more.
    ///
    /// Report every answer; an informational one (1xx) changes nothing. A 401 is handled
    /// [as by `RefreshLayer`](crate::replay#what-a-401-causes): it blames the key or the JWT, which is refreshed, and the
    /// request is to be replayed once there is another. One request is replayed at most once. An accepted replay tells the
    /// engine that the refresh has helped.
    ///
    /// `body` is the beginning of the answer's body, of which the layer reads
    /// [64 KiB](crate::SelamLayerBuilder::with_error_body_limit). Without it, a 401 tells from its headers alone which
    /// credential it blames: the JWT, if the request carried one.
    ///
    /// # Errors
    ///
    /// The final 401 or 403, with the credentials that were sent masked.
    ///
    /// # Cancel safety
    ///
    /// A refresh continues without its caller. The request is not to be replayed.
    pub async fn should_replay(
        &mut self,
        status: StatusCode,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Result<bool, AuthError> {
        if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS {
            return Ok(false);
        }
        let progress = mem::replace(&mut self.progress, Progress::Last);
        if let Progress::Replay(blame) = &progress {
            if is_accepted(status) {
                blame.accept();
            }
            event::request_replayed(Some(status));
        }
        if !is_auth_status(status) {
            return Ok(false);
        }
        let body = &body[..body.len().min(self.limits.size)];
        let error = AuthError::of_answer(status, headers, body, self.sent.exposed());
        if status == StatusCode::UNAUTHORIZED
            && !matches!(progress, Progress::Replay(_))
            && let Some(blame) = Blame::assign(&self.sent, error.kind())
        {
            let (_, refresh) = blame.reject();
            if let Progress::First = progress {
                if let Some(refresh) = refresh {
                    // Whether it succeeded shows in whether there is a replacement.
                    let _ = WaitForRefresh::new(refresh).await;
                }
                if blame.has_replacement() {
                    self.progress = Progress::Replay(blame);
                    return Ok(true);
                }
            }
        }
        event::request_rejected(&error, self.sent.ids());
        Err(error)
    }

    /// Writes the credentials that are current now into the request's head: before it is sent once more, because of
    /// [`should_replay`](Self::should_replay) or because its connection broke.
    ///
    /// # Errors and cancel safety
    ///
    /// As [`SelamLayer::authorize`].
    pub async fn authorize_again(&mut self, head: &mut Parts) -> Result<(), AuthError> {
        self.sent = self.policy.authorize_head(head).await?;
        self.headers = written(head);
        Ok(())
    }

    /// Rules a replay out, because the host cannot send the request's body again. A 401 still refreshes the credential, for
    /// the next request, and is not waited for.
    pub fn forbid_replay(&mut self) {
        if let Progress::First = self.progress {
            self.progress = Progress::Last;
        }
    }

    /// Returns the headers that the layer owns, for hosts with another header type: set the one with this value
    /// alone, or remove it if there is none. Values are marked [sensitive](HeaderValue::is_sensitive). The credentials of a
    /// [voice agent's](crate::RequestAuth::VoiceAgent) request are in the URI of its head instead.
    ///
    /// A host that forwards an inbound request also has to drop its `Connection` header, which might name these; the head
    /// given to [`authorize`](SelamLayer::authorize) no longer does.
    ///
    /// ```
    /// # use http::Request;
    /// # use tower_selam::{ApiKey, SelamLayer};
    /// # tokio_test::block_on(async {
    /// # let layer = SelamLayer::builder().with_api_key(ApiKey::new("sk-selam-example")?).build()?;
    /// # let (mut head, ()) = Request::post(layer.base_url().endpoint("chat/completions")?).body(())?.into_parts();
    /// let authorized = layer.authorize(&mut head).await?;
    /// let headers = authorized.headers().map(|(name, value)| (name.as_str(), value.map(|value| value.as_bytes())));
    /// assert_eq!(headers, [("authorization", Some(&b"Bearer sk-selam-example"[..])), ("x-api-key", None)]);
    /// # Ok::<(), tower_selam::BoxError>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn headers(&self) -> [(&HeaderName, Option<&HeaderValue>); 2] {
        self.headers.each_ref().map(|(name, value)| (name, value.as_ref()))
    }
}

/// What a head has in the headers that the layer owns.
fn written(head: &Parts) -> [(HeaderName, Option<HeaderValue>); 2] {
    [AUTHORIZATION, X_API_KEY].map(|name| {
        let value = head.headers.get(&name).cloned();
        (name, value)
    })
}

impl fmt::Debug for Authorized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorized").field("sent", &self.sent.ids()).finish_non_exhaustive()
    }
}
