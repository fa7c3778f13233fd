//! The OAuth 2.0 token endpoint, with faults and a count of its own.

mod client;
mod denial;
mod fault;
mod form;
mod grant;
mod refresh;

use std::{
    collections::{HashMap, VecDeque},
    future,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};

pub use self::fault::TokenFault;
use self::{denial::Denial, grant::Validity, refresh::RefreshTokens};
use super::{
    Received, Simulator, SimulatorBody, State, api::Answer, quota::set_if_absent, random_hex, replies,
};

pub(super) const PATH: &str = "/oauth/token";

const HOUR: Duration = Duration::from_secs(60 * 60);

/// What the token endpoint knows.
pub(super) struct TokenEndpoint {
    /// Secrets by id.
    clients: HashMap<String, String>,
    refresh: RefreshTokens,
    lifetime: Duration,
    faults: VecDeque<TokenFault>,
    outage: bool,
    requests: u64,
}

impl TokenEndpoint {
    pub(super) fn new() -> Self {
        Self {
            clients: HashMap::new(),
            refresh: RefreshTokens::new(),
            lifetime: HOUR,
            faults: VecDeque::new(),
            outage: false,
            requests: 0,
        }
    }

    /// What the request that just came meets.
    fn count(&mut self) -> Option<TokenFault> {
        self.requests += 1;
        if self.outage { Some(TokenFault::Unavailable) } else { self.faults.pop_front() }
    }
}

/// The token endpoint, `POST /oauth/token`.
impl Simulator {
    /// The id and the secret of a new client.
    ///
    /// The secret has characters that a form encodes, so that who sends it raw is found out.
    #[must_use]
    pub fn issue_client(&self) -> (String, String) {
        let id = format!("client-{}", random_hex());
        let secret = format!("secret+{}/%:=", random_hex());
        self.state().tokens.clients.insert(id.clone(), secret.clone());
        (id, secret)
    }

    /// A new refresh token, the first of its family.
    #[must_use]
    pub fn issue_refresh_token(&self) -> String {
        self.state().tokens.refresh.issue()
    }

    /// Whether the endpoint would accept this refresh token.
    #[must_use]
    pub fn is_refresh_token_valid(&self, token: &str) -> bool {
        self.state().tokens.refresh.is_valid(token)
    }

    /// How often a refresh token came that was spent already.
    #[must_use]
    pub fn reused_refresh_tokens(&self) -> u64 {
        self.state().tokens.refresh.reused()
    }

    /// Whether each use of a refresh token spends it and gives a new one, as it does from the start.
    ///
    /// If not, the answer has no `refresh_token`, and the one that came stays valid.
    pub fn rotate_refresh_tokens(&self, rotate: bool) {
        self.state().tokens.refresh.rotate(rotate);
    }

    /// Has the endpoint refuse every refresh token issued so far.
    pub fn revoke_refresh_tokens(&self) {
        self.state().tokens.refresh.revoke_all();
    }

    /// Has access tokens live so long from now on; an hour without.
    pub fn set_token_lifetime(&self, lifetime: Duration) {
        self.state().tokens.lifetime = lifetime;
    }

    /// Whether every request to the endpoint is answered 503. Faults wait until that is over.
    pub fn set_token_outage(&self, outage: bool) {
        self.state().tokens.outage = outage;
    }

    /// Has the endpoint's next request that no earlier fault awaits meet `fault`.
    pub fn inject_token_fault(&self, fault: TokenFault) {
        self.state().tokens.faults.push_back(fault);
    }

    /// The number of requests that the endpoint received.
    #[must_use]
    pub fn token_requests(&self) -> u64 {
        self.state().tokens.requests
    }
}

pub(super) async fn answer(simulator: Simulator, request: Received, body: Bytes) -> Answer {
    let (fault, number) = {
        let mut state = simulator.state();
        state.remember(request.clone());
        (state.tokens.count(), state.requests)
    };
    let carry_out = |validity| exchange(&mut simulator.state(), &request, &body, validity);
    let mut answer = match fault {
        None => carry_out(Validity::Configured),
        Some(TokenFault::Slow(wait)) => {
            let answer = carry_out(Validity::Configured);
            tokio::time::sleep(wait).await;
            answer
        }
        Some(TokenFault::Hang) => future::pending().await,
        Some(TokenFault::Expired) => carry_out(Validity::Over),
        Some(TokenFault::CutOff) => carry_out(Validity::Configured).map(SimulatorBody::cut_in_half),
        Some(TokenFault::ServerError) => denial::SERVER_ERROR.answer(),
        Some(TokenFault::Unavailable) => denial::UNAVAILABLE.answer(),
        Some(TokenFault::RateLimited { retry_after }) => denial::rate_limited(retry_after),
        Some(TokenFault::InvalidGrant) => Denial::invalid_grant("The grant is not valid.").answer(),
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

fn exchange(state: &mut State, request: &Received, body: &[u8], validity: Validity) -> Answer {
    if request.method != Method::POST {
        let mut answer = denial::METHOD_NOT_ALLOWED.answer();
        answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("POST"));
        return answer;
    }
    let granted = if request.body_length > body.len() as u64 {
        Err(Denial::invalid_request("The body is too large."))
    } else {
        grant::carry_out(state, &request.headers, body, validity)
    };
    granted.map_or_else(Denial::answer, |granted| denial::unstored(StatusCode::OK, &granted))
}

fn redirect(location: &str) -> Answer {
    let mut answer = Response::new(SimulatorBody::stream([]));
    *answer.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    replies::set(answer.headers_mut(), &header::LOCATION, location);
    answer
}
