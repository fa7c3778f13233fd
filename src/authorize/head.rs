//! The layers' decision for a request's head, without Tower.

use std::{future::poll_fn, mem};

use http::{Request, request::Parts};

use super::{
    policy::{Decision, Policy},
    sent::Sent,
};
use crate::{AuthError, telemetry::event};

impl Policy {
    /// Decides what a request gets and writes it into its head, after a refresh if one is due. A head that is refused, or
    /// whose caller stops waiting, stays as it is.
    pub(crate) async fn authorize_head(&self, head: &mut Parts) -> Result<Sent, AuthError> {
        loop {
            let (empty, ()) = Request::new(()).into_parts();
            let mut request = Request::from_parts(mem::replace(head, empty), ());
            let decision = self.authorize(&mut request);
            (*head, ()) = request.into_parts();
            match decision.inspect_err(event::request_not_sent)? {
                Decision::Send(sent) => return Ok(sent),
                Decision::Wait(mut pending) => {
                    poll_fn(|cx| pending.poll(cx)).await.inspect_err(event::request_not_sent)?;
                }
            }
        }
    }
}
