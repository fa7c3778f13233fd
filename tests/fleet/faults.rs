//! N7, N2: members that are killed or stopped in the middle of the protocol.

use std::time::Duration;

use tower_selam::simulator::TokenFault;

use crate::support::{World, eventually};

/// The lease of a leader that is killed or stopped. The others have the default, so that a busy machine ends none.
const LEASE: u32 = 600;

/// N7: a leader that is killed at each point of the protocol, for a token that can be fetched twice.
#[tokio::test]
async fn a_killed_leader_is_replaced() {
    // The claim is the first write, the token the second.
    for (dies, requests) in [("after 1", 1), ("before 2", 2), ("after 2", 1)] {
        let Some(world) = World::start().await else { return };
        let [mut leader] = world.members(|launch| launch.with("LEASE", LEASE).with("DIES", dies));
        let [mut other] = world.members(|launch| launch);
        leader.tell("token").await;
        leader.ended().await;
        other.token().await;
        assert_eq!(world.issuer.token_requests(), requests, "{dies}");
    }
}

/// N2: a leader that is killed at each point of the rotation. The login lives on, except if the only copy of its next refresh
/// token died with the leader. Then the members learn it once.
#[tokio::test]
async fn a_killed_leader_loses_no_stored_login() {
    // The claim is the first write, the next refresh token the second, the access token the third.
    for (dies, requests) in [("after 1", 1), ("after 2", 2), ("before 3", 2), ("after 3", 1)] {
        let Some(world) = World::start().await else { return };
        world.log_in().await;
        let [mut leader] = world.members(|launch| launch.login().with("LEASE", LEASE).with("DIES", dies));
        let [mut other] = world.members(|launch| launch.login());
        leader.tell("token").await;
        leader.ended().await;
        other.token().await;
        assert_eq!(world.issuer.token_requests(), requests, "{dies}");
        assert_eq!(world.issuer.reused_refresh_tokens(), 0, "{dies}");
    }

    let Some(world) = World::start().await else { return };
    world.log_in().await;
    let [mut leader] = world.members(|launch| launch.login().with("LEASE", LEASE).with("DIES", "before 2"));
    let mut others = world.members::<3>(|launch| launch.login());
    leader.tell("token").await;
    leader.ended().await;
    for other in &mut others {
        let answer = other.ask("token").await;
        assert!(answer.starts_with("RefreshRejected: "), "{answer}");
    }
    assert_eq!(world.issuer.token_requests(), 2);
    world.log_in().await;
    for other in &mut others {
        other.is_served().await;
    }
}

/// N7: a leader that is stopped beyond its lease takes nothing back.
#[tokio::test]
async fn a_stopped_leader_takes_nothing_back() {
    let Some(world) = World::start().await else { return };
    world.issuer.inject_token_fault(TokenFault::Slow(Duration::from_millis(200)));
    let [mut leader] = world.members(|launch| launch.with("LEASE", LEASE));
    let [mut other, mut third] = world.members(|launch| launch);
    leader.tell("token").await;
    eventually("it leads", async || (world.issuer.token_requests() == 1).then_some(())).await;
    leader.stop();
    let theirs = other.token().await;
    leader.resume();
    assert!(leader.answer().await.unwrap().starts_with("token "));
    assert_eq!(third.token().await, theirs);
    assert_eq!(other.token().await, theirs);
    assert_eq!(world.issuer.token_requests(), 2);
}

/// N2: while a leader is stopped, its refresh token is spared, and the valid access token is served. Later its next
/// refresh token is stored although the lease is over.
#[tokio::test]
async fn a_stopped_leader_keeps_its_login() {
    let Some(world) = World::start().await else { return };
    world.log_in().await;
    world.issuer.set_token_lifetime(Duration::from_secs(6));
    let [mut leader, mut other] = world.members(|launch| launch.login().with("LEASE", 1000));
    // Engines begin the next refresh the earlier, the longer the last one took.
    world.issuer.inject_token_fault(TokenFault::Slow(Duration::from_millis(1500)));
    leader.tell("token").await;
    eventually("it leads", async || (world.issuer.token_requests() == 1).then_some(())).await;
    let first = other.token().await;
    assert_eq!(leader.answer().await.as_ref(), Some(&first));
    world.issuer.set_token_lifetime(Duration::from_secs(3600));
    world.issuer.inject_token_fault(TokenFault::Slow(Duration::from_millis(100)));
    leader.tell("load 6000").await;
    eventually("it refreshes", async || (world.issuer.token_requests() == 2).then_some(())).await;
    leader.stop();
    assert_eq!(other.ask("load 1400").await.split(',').next(), Some("failed 0"));
    assert_eq!(other.token().await, first);
    assert_eq!(world.issuer.token_requests(), 2, "the refresh token is spared");
    leader.resume();
    let next = eventually("the late token arrives", async || {
        let token = other.token().await;
        (token != first).then_some(token)
    });
    let next = next.await;
    assert_eq!(leader.answer().await.unwrap().split(',').next(), Some("failed 0"));
    assert_eq!(leader.token().await, next);
    assert_eq!((world.issuer.token_requests(), world.issuer.reused_refresh_tokens()), (2, 0));
}
