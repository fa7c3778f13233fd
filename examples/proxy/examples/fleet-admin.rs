//! Shows what a fleet of replicas shares, without secrets, and ends or begins it.
//!
//! ```console
//! $ export SELAM_FLEET=billing SELAM_FLEET_STORE=redis://redis.internal SELAM_FLEET_KEY_FILE=fleet-key
//! $ cargo run --example fleet-admin -- status service
//! service: generation 1764513205113, token 3f9a12 for 41m 7s
//! $ cargo run --example fleet-admin -- forget service              # the replicas request another JWT
//! $ cargo run --example fleet-admin -- log-in my-login < token     # a refresh token, for programs that share a login
//! ```
//!
//! The proxy's own JWT is called `service`, a user's `user:` and the SHA-256 of issuer and user in hex; see `README.md`.

use std::{
    env,
    io::{self, Read},
    path::Path,
    process::ExitCode,
};

use example_proxy::fleet::{self, Store};
use secrecy::{ExposeSecret, SecretString};
use tower_selam::{BoxError, fleet::Fleet, oauth::RefreshToken};

const USAGE: &str = "usage: fleet-admin status|forget|log-in NAME\n\n\
    status   show what the fleet knows of the token NAME\n\
    forget   end it in all replicas: a source without a login fetches another one\n\
    log-in   begin, or replace, the login NAME with the refresh token on standard input\n\n\
    SELAM_FLEET, SELAM_FLEET_STORE and SELAM_FLEET_KEY_FILE name the fleet, its Redis or Valkey and the file with its keys.\n\
    SSL_CERT_FILE names further certificate authorities.";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [command, name] = &*arguments else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(command, name).await {
        Ok(answer) => println!("{name}: {answer}"),
        Err(error) => {
            eprintln!("fleet-admin: {}", chain(&*error));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

async fn run(command: &str, name: &str) -> Result<String, BoxError> {
    let fleet = join()?;
    Ok(match command {
        "status" => match fleet.status(name).await? {
            Some(status) => status.to_string(),
            None => "the fleet has no such token".to_owned(),
        },
        "forget" => {
            fleet.forget(name).await?;
            "ended".to_owned()
        }
        "log-in" => {
            let mut token = String::new();
            io::stdin().read_to_string(&mut token)?;
            let token = SecretString::from(token);
            fleet.log_in(name, &RefreshToken::new(token.expose_secret().trim())?).await?;
            "logged in".to_owned()
        }
        _ => return Err(USAGE.into()),
    })
}

fn join() -> Result<Fleet, BoxError> {
    let variable = |name: &str| match env::var(name) {
        Ok(value) if !value.is_empty() => Ok(value),
        _ => Err(format!("{name} is not set")),
    };
    let store = Store::parse(&variable(fleet::STORE)?)?;
    let keys = variable("SELAM_FLEET_KEY_FILE")?;
    Ok(fleet::join(&variable("SELAM_FLEET")?, &store, Path::new(&keys), None)?)
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
