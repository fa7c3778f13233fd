//! Routes requests, checks their credentials and picks the response.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, Method, Request, Response, header::AUTHORIZATION};
use http_body::Body;
use http_body_util::BodyExt;
use serde_json::Value;

use super::{
    Access, Fault, Received, Simulator, SimulatorBody, State,
    agent::{self, Routed},
    quota::set_if_absent,
    refusal::{self, Refusal},
    replies, token,
};
use crate::BoxError;

/// The largest request body that is parsed; larger ones get 413.
const PARSED_BODY: usize = 8 * 1024 * 1024;

/// How much of a body `Received` keeps.
const RECORDED_BODY: usize = 64 * 1024;

pub(super) type Answer = Response<SimulatorBody>;

pub(super) async fn answer<B>(simulator: Simulator, request: Request<B>) -> Answer
where
    B: Body,
    B::Error: Into<BoxError>,
{
    let (parts, body) = request.into_parts();
    let (body, body_length) = read(body).await;
    let received = Received {
        method: parts.method,
        uri: parts.uri,
        version: parts.version,
        headers: parts.headers,
        body: body.slice(..body.len().min(RECORDED_BODY)),
        body_length,
    };
    if received.uri.path() == token::PATH {
        return token::answer(simulator, received, body).await;
    }

    let (fault, routed, window, number) = {
        let mut state = simulator.state();
        state.record(received.clone());
        let fault = state.faults.pop_front();
        let window = state.window.count();
        let routed = match &fault {
            Some(Fault::Html(status)) => Ok(Routed::Now(replies::html(*status))),
            Some(Fault::RateLimited { retry_after }) => {
                Ok(Routed::Now(refusal::RATE_LIMITED.answer_with_retry_after(*retry_after)))
            }
            Some(Fault::Unavailable) => Err(refusal::UNAVAILABLE),
            Some(Fault::Answer(answer)) => Ok(Routed::Now(answer.clone().map(SimulatorBody::whole))),
            _ if window.is_exceeded() => {
                Ok(Routed::Now(refusal::RATE_LIMITED.answer_with_retry_after(window.reset_after())))
            }
            _ if received.uri.path() == agent::PATH => agent::route(&mut state, &received, &body),
            _ => route(&state, &received, &body).map(Routed::Now),
        };
        (fault, routed, window, state.requests)
    };
    if let Some(Fault::Stall) = fault {
        std::future::pending::<()>().await;
    }
    let answer = match routed {
        Ok(Routed::Now(answer)) => answer,
        Ok(Routed::Poll(session)) => agent::poll(&session).await,
        Err(refusal) => refusal.answer(),
    };
    let mut answer = match &fault {
        Some(fault) => answer.map(|body| body.with_fault(fault)),
        None => answer,
    };
    window.write(answer.headers_mut());
    set_if_absent(answer.headers_mut(), "x-request-id", &format!("req_{number}"));
    answer
}

/// Returns the start of the body and its full length. A body that breaks off counts up to that point.
async fn read<B: Body>(body: B) -> (Bytes, u64) {
    let mut body = Box::pin(body);
    let (mut kept, mut length) = (BytesMut::new(), 0);
    while let Some(Ok(frame)) = body.frame().await {
        if let Ok(mut data) = frame.into_data() {
            length += data.remaining() as u64;
            kept.put((&mut data).take(PARSED_BODY - kept.len()));
        }
    }
    (kept.freeze(), length)
}

fn route(state: &State, request: &Received, body: &[u8]) -> Result<Answer, Refusal> {
    let reply = match request.uri.path() {
        "/v1/chat/completions" => replies::chat,
        "/v1/chat/completions/batch" => replies::batch,
        "/v1/images/generations" => |_: &Value| replies::image(),
        "/v1/audio/speech" => |_: &Value| replies::speech(),
        "/v1/audio/agent/sessions" => replies::session,
        _ => return Err(refusal::NOT_FOUND),
    };
    call(state, request, body).map(|body| reply(&body))
}

/// Checks a call, and returns its body.
fn call(state: &State, request: &Received, body: &[u8]) -> Result<Value, Refusal> {
    let path = request.uri.path();
    if request.method != Method::POST {
        return Err(refusal::METHOD_NOT_ALLOWED);
    }
    let caller = authenticate(state, &request.headers)?;
    if caller.access == Access::Limited && !path.starts_with("/v1/chat/") {
        return Err(refusal::INSUFFICIENT_PERMISSIONS);
    }
    if path == "/v1/audio/agent/sessions" && !caller.has_jwt {
        return Err(refusal::MISSING_JWT);
    }
    if request.body_length > body.len() as u64 {
        return Err(refusal::TOO_LARGE);
    }
    serde_json::from_slice(body).map_err(|_| refusal::BAD_JSON)
}

pub(super) struct Caller {
    pub(super) access: Access,
    has_jwt: bool,
}

/// Accepts the key as bearer, a JWT as bearer with the key in `X-API-Key`, or the key in `X-API-Key` alone.
fn authenticate(state: &State, headers: &HeaderMap) -> Result<Caller, Refusal> {
    let authorization = only(headers, &AUTHORIZATION)?;
    let x_api_key = only(headers, &HeaderName::from_static("x-api-key"))?;
    let bearer = authorization.map(|value| value.strip_prefix("Bearer ").ok_or(refusal::MISSING_API_KEY));
    match (bearer.transpose()?, x_api_key) {
        // A bearer with two dots is a JWT whose key is missing. Any other bearer is taken as a key.
        (Some(jwt), None) if jwt.matches('.').count() == 2 => Err(refusal::MISSING_API_KEY),
        (Some(key), None) => check(state, None, key),
        (None, None) => Err(refusal::MISSING_API_KEY),
        (jwt, Some(key)) => check(state, jwt, key),
    }
}

pub(super) fn check(state: &State, jwt: Option<&str>, key: &str) -> Result<Caller, Refusal> {
    let access = *state.keys.get(key).ok_or(refusal::INVALID_API_KEY)?;
    match jwt {
        Some(_) if state.reject_jwts => Err(refusal::INVALID_JWT),
        Some(jwt) if !state.issuer.accepts(jwt, state.clock.now().wall) => Err(refusal::INVALID_JWT),
        jwt => Ok(Caller { access, has_jwt: jwt.is_some() }),
    }
}

/// Returns a header's only value. Refuses duplicates, so that tests notice them.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Refusal> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map(|value| value.to_str().unwrap_or_default());
    match values.next() {
        Some(_) => Err(refusal::DUPLICATE_HEADER),
        None => Ok(value),
    }
}
