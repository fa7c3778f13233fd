//! The OAuth 2.0 token endpoint, which has its own faults and request count.

mod grant;
mod request;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};

use self::grant::RefreshTokens;
use super::{
    Received, Simulator, SimulatorBody, State, TokenFault,
    api::Answer,
    quota::set_if_absent,
    random_hex,
    refusal::{Refusal, invalid_grant, invalid_request},
    replies,
};

pub(super) const PATH: &str = "/oauth/token";

/// The state of the token endpoint.
#[derive(Default)]
pub(super) struct TokenEndpoint {
    /// Client secrets by client id.
    clients: HashMap<String, String>,
    /// The `jti` of every client assertion that was accepted.
    assertions: HashSet<String>,
    refresh: RefreshTokens,
    /// One hour by default.
    lifetime: Option<Duration>,
    faults: VecDeque<TokenFault>,
    outage: bool,
    requests: u64,
}

impl TokenEndpoint {
    /// Counts a request and returns the fault it gets.
    fn next_fault(&mut self) -> Option<TokenFault> {
        self.requests += 1;
        if self.outage { Some(TokenFault::Unavailable) } else { self.faults.pop_front() }
    }
}

/// The token endpoint, `POST /oauth/token`.
impl Simulator {
    /// Registers a new client and returns its id and secret.
    ///
    /// The client may authenticate by its secret, or by assertions that it signs with the secret, HMAC and SHA-256.
    ///
    /// The secret contains characters that need form encoding, so that a client that sends it raw is rejected.
    #[must_use]
    pub fn issue_client(&self) -> (String, String) {
        let id = format!("client-{}", random_hex());
        let secret = format!("secret+{}/%:=", random_hex());
        self.state().tokens.clients.insert(id.clone(), secret.clone());
        (id, secret)
    }

    /// Issues a refresh token, the first of a new family.
    #[must_use]
    pub fn issue_refresh_token(&self) -> String {
        self.state().tokens.refresh.issue()
    }

    /// Returns whether the endpoint would accept this refresh token. Does not spend it.
    #[must_use]
    pub fn is_refresh_token_valid(&self, token: &str) -> bool {
        self.state().tokens.refresh.is_valid(token)
    }

    /// Returns how many requests presented a refresh token that was already spent.
    #[must_use]
    pub fn reused_refresh_tokens(&self) -> u64 {
        self.state().tokens.refresh.reused
    }

    /// Sets whether each use of a refresh token spends it and returns a new one. On by default.
    ///
    /// If off, responses contain no `refresh_token`, and the one used stays valid.
    pub fn rotate_refresh_tokens(&self, rotate: bool) {
        self.state().tokens.refresh.reusable = !rotate;
    }

    /// Revokes every refresh token issued so far.
    pub fn revoke_refresh_tokens(&self) {
        self.state().tokens.refresh.revoke_all();
    }

    /// Sets the lifetime of access tokens issued from now on. The default is one hour.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.state().tokens.lifetime = Some(lifetime);
    }

    /// Starts or ends an outage, during which the endpoint answers every request with 503.
    ///
    /// Injected faults stay queued until the outage ends.
    pub fn set_token_outage(&self, outage: bool) {
        self.state().tokens.outage = outage;
    }

    /// Queues `fault`. Each token request takes one fault from the queue, oldest first.
    pub fn inject_token_fault(&self, fault: TokenFault) {
        self.state().tokens.faults.push_back(fault);
    }

    /// Returns the number of requests that the token endpoint received.
    #[must_use]
    pub fn token_requests(&self) -> u64 {
        self.state().tokens.requests
    }
}

pub(super) async fn answer(simulator: Simulator, request: Received, body: Bytes) -> Answer {
    let (fault, number) = {
        let mut state = simulator.state();
        state.record(request.clone());
        (state.tokens.next_fault(), state.requests)
    };
    let carry_out = |is_expired| exchange(&mut simulator.state(), &request, &body, is_expired);
    let mut answer = match fault {
        None => carry_out(false),
        Some(TokenFault::Slow(wait)) => {
            let answer = carry_out(false);
            tokio::time::sleep(wait).await;
            answer
        }
        Some(TokenFault::Hang) => future::pending().await,
        Some(TokenFault::Expired) => carry_out(true),
        Some(TokenFault::CutOff) => carry_out(false).map(SimulatorBody::cut_in_half),
        Some(TokenFault::ServerError) => {
            Refusal::oauth(500, "server_error", "Something went wrong.").answer()
        }
        Some(TokenFault::Unavailable) => {
            Refusal::oauth(503, "temporarily_unavailable", "Try again later.").answer()
        }
        Some(TokenFault::RateLimited { retry_after }) => {
            Refusal::oauth(429, "rate_limit_exceeded", "Rate limit exceeded.")
                .answer_with_retry_after(retry_after)
        }
        Some(TokenFault::InvalidGrant) => invalid_grant("The grant is not valid.").answer(),
        Some(TokenFault::Garbage) => {
            replies::answered(StatusCode::OK, "application/json", SimulatorBody::whole(r#"{"access_token":"#))
        }
        Some(TokenFault::Html) => replies::html(StatusCode::OK),
        Some(TokenFault::Redirect(location)) => redirect(&location),
        Some(TokenFault::Answer(answer)) => answer.map(SimulatorBody::whole),
    };
    set_if_absent(answer.headers_mut(), "x-request-id", &format!("req_{number}"));
    answer
}

fn exchange(state: &mut State, request: &Received, body: &[u8], is_expired: bool) -> Answer {
    if request.method != Method::POST {
        // The RFC defines no code for this.
        let mut answer = Refusal::oauth(405, "invalid_request", "Tokens are requested with POST.").answer();
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return answer;
    }
    let granted = if request.body_length > body.len() as u64 {
        Err(invalid_request("The body is too large."))
    } else {
        grant::carry_out(state, &request.headers, body, is_expired)
    };
    granted.map_or_else(Refusal::answer, |granted| replies::uncached_json(StatusCode::OK, &granted))
}

fn redirect(location: &str) -> Answer {
    let mut answer = Response::new(SimulatorBody::stream([]));
    *answer.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    replies::set(answer.headers_mut(), &header::LOCATION, location);
    answer
}
