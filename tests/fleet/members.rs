//! What members do together: fetch once, rotate a login, hear of rejections, share failures, leave.

use std::time::Duration;

use tokio::time::Instant;
use tower_selam::simulator::TokenFault;

use crate::support::{Member, World, eventually};

/// Sends a command to all members, and returns their answers.
async fn all(members: &mut [Member], command: &str) -> Vec<String> {
    for member in &mut *members {
        member.tell(command).await;
    }
    let mut answers = Vec::new();
    for member in members {
        answers.push(member.answer().await.unwrap_or_else(|| panic!("it has ended: {}", member.log())));
    }
    answers
}

/// All members have one token, which is returned.
async fn one_token(members: &mut [Member]) -> String {
    let mut answers = all(members, "token").await;
    answers.dedup();
    assert!(answers.len() == 1 && answers[0].starts_with("token "), "{answers:?}");
    answers.remove(0)
}

/// N1: 6 processes with 20 engines each.
#[tokio::test]
async fn a_cold_fleet_fetches_once() {
    let Some(world) = World::start().await else { return };
    world.issuer.inject_token_fault(TokenFault::Slow(Duration::from_millis(50)));
    let mut members = world.members::<6>(|launch| launch.with("ENGINES", 20));
    one_token(&mut members).await;
    assert_eq!(world.issuer.token_requests(), 1);
}

/// N1, N2: tokens that live for two seconds. No request fails, and one member refreshes for all.
#[tokio::test]
async fn short_tokens_are_refreshed_by_one_member() {
    for is_login in [false, true] {
        let Some(world) = World::start().await else { return };
        world.issuer.set_token_lifetime(Duration::from_secs(2));
        if is_login {
            world.log_in().await;
        }
        let mut members = world.members::<4>(|launch| if is_login { launch.login() } else { launch });
        one_token(&mut members).await;
        for answer in all(&mut members, "load 5000").await {
            assert!(answer.starts_with("failed 0,"), "{answer}");
        }
        assert_eq!(world.issuer.reused_refresh_tokens(), 0);
        // The claims are in whole seconds, so a token may live for little more than one. It is refreshed after half of it.
        let requests = world.issuer.token_requests();
        assert!((3..=12).contains(&requests), "{requests} requests");
    }
}

/// N4: others have stopped using the token after about a second.
#[tokio::test]
async fn a_rejected_token_is_withdrawn_everywhere() {
    let Some(world) = World::start().await else { return };
    let mut members = world.members::<4>(|launch| launch);
    let rejected = one_token(&mut members).await;
    let rejection = Instant::now();
    assert_eq!(members[0].ask("reject").await, rejected);
    let replaced = members[0].token().await;
    assert_ne!(replaced, rejected);
    for member in &mut members[1..] {
        eventually("the token is withdrawn", async || {
            (member.ask("current").await != rejected).then_some(())
        })
        .await;
    }
    // The news are read once a second; a busy machine takes a little longer.
    assert!(rejection.elapsed() < Duration::from_millis(1500), "{:?}", rejection.elapsed());
    assert_eq!(one_token(&mut members).await, replaced);
    assert_eq!(world.issuer.token_requests(), 2);
}

/// N5: no member calls the endpoint before the time that it has told one of them.
#[tokio::test]
async fn failures_are_shared() {
    let Some(world) = World::start().await else { return };
    world.issuer.inject_token_fault(TokenFault::RateLimited { retry_after: Duration::from_secs(3) });
    let mut members = world.members::<4>(|launch| launch);
    for _ in 0..3 {
        for answer in all(&mut members, "token").await {
            assert!(answer.starts_with("RefreshFailed: "), "{answer}");
        }
    }
    assert_eq!(world.issuer.token_requests(), 1);
    for member in &mut members {
        member.is_served().await;
    }
    one_token(&mut members).await;
    assert_eq!(world.issuer.token_requests(), 2);
}

/// N5: a revoked login is tried once, and a new login heals all.
#[tokio::test]
async fn a_revoked_login_is_tried_once() {
    let Some(world) = World::start().await else { return };
    world.log_in().await;
    world.issuer.revoke_refresh_tokens();
    let mut members = world.members::<4>(|launch| launch.login());
    for _ in 0..2 {
        for answer in all(&mut members, "token").await {
            assert!(answer.starts_with("RefreshRejected: "), "{answer}");
        }
    }
    assert_eq!(world.issuer.token_requests(), 1);
    world.log_in().await;
    for member in &mut members {
        member.is_served().await;
    }
    assert_eq!(world.issuer.token_requests(), 2);
}

/// N4: a login that ends is not used any more.
#[tokio::test]
async fn a_login_that_ends_ends_everywhere() {
    let Some(world) = World::start().await else { return };
    world.log_in().await;
    let mut members = world.members::<3>(|launch| launch.login());
    one_token(&mut members).await;
    world.fleet().await.forget("selam").await.unwrap();
    for member in &mut members {
        eventually("it has stopped", async || (member.ask("current").await == "none").then_some(())).await;
    }
    for answer in all(&mut members, "token").await {
        assert!(answer.contains("nobody has logged in"), "{answer}");
    }
    assert_eq!(world.issuer.token_requests(), 1);
}

/// N7: another member takes over at once if the leader leaves in the middle of a fetch.
#[tokio::test]
async fn a_member_that_leaves_gives_its_lease_back() {
    let Some(world) = World::start().await else { return };
    world.issuer.inject_token_fault(TokenFault::Hang);
    let [mut leaver, mut other] = world.members(|launch| launch.with("LEASE", 60_000));
    leaver.tell("token").await;
    eventually("it leads", async || (world.issuer.token_requests() == 1).then_some(())).await;
    assert_eq!(leaver.ask("leave").await, "left");
    other.token().await;
    assert_eq!(world.issuer.token_requests(), 2);
}

/// N7: a member that spends a refresh token leaves when the next one is stored.
#[tokio::test]
async fn a_member_leaves_after_its_exchange() {
    let Some(world) = World::start().await else { return };
    world.log_in().await;
    world.issuer.inject_token_fault(TokenFault::Slow(Duration::from_millis(300)));
    let [mut leaver, mut other] = world.members(|launch| launch.login().with("LEASE", 60_000));
    leaver.tell("token").await;
    eventually("it leads", async || (world.issuer.token_requests() == 1).then_some(())).await;
    leaver.tell("leave").await;
    let answers = [leaver.answer().await.unwrap(), leaver.answer().await.unwrap()];
    leaver.kill().await;
    let token = other.token().await;
    assert!(answers.contains(&token) && answers.contains(&"left".to_owned()), "{answers:?}");
    assert_eq!(world.issuer.token_requests(), 1);
}
