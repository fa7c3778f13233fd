//! N6: a Redis that is slow, dies, restarts empty or fails over, and lines to it that fail.

use std::time::Duration;

use tower_selam::fleet::Status;

use crate::support::{Forwarder, Launch, Line, RedisServer, World, eventually, join};

/// While `CLIENT PAUSE` or a stopped process holds Redis up, a member fetches alone.
#[tokio::test]
async fn a_slow_store_fails_no_request() {
    let Some(world) = World::start().await else { return };
    world.issuer.set_token_lifetime(Duration::from_secs(2));
    let [mut member] = world.members(|launch| launch);
    member.token().await;
    let () = world.redis.run("CLIENT PAUSE 5000 ALL").await;
    let paused = member.ask("load 2500").await;
    world.redis.stop();
    let stopped = member.ask("load 2500").await;
    world.redis.resume();
    for answer in [paused, stopped] {
        let slowest = answer.strip_prefix("failed 0, slowest ").and_then(|millis| millis.parse::<u32>().ok());
        assert!(slowest.is_some_and(|millis| millis < 1_000), "{answer}");
    }
    assert!(world.issuer.token_requests() >= 3);
}

/// Members put back what the store has lost, without a call of the endpoint. What has ended does not come back.
#[tokio::test]
async fn an_empty_store_is_mended() {
    for is_login in [false, true] {
        let Some(mut world) = World::start().await else { return };
        if is_login {
            world.log_in().await;
        }
        let [mut first, mut second] = world.members(|launch| if is_login { launch.login() } else { launch });
        let token = first.token().await;
        assert_eq!(second.token().await, token);
        let before = world.status().await.unwrap();
        world.redis.kill().await;
        world.redis.restart().await;
        let same = |status: &Status| {
            (status.generation, status.token, status.refresh_token)
                == (before.generation, before.token, before.refresh_token)
        };
        eventually("it is mended", async || world.status().await.filter(same)).await;
        let [mut third] = world.members(|launch| if is_login { launch.login() } else { launch });
        assert_eq!(third.token().await, token);
        assert_eq!(world.issuer.token_requests(), 1);
        if !is_login {
            continue;
        }

        world.fleet().await.forget("selam").await.unwrap();
        for member in [&mut first, &mut second, &mut third] {
            eventually("it has stopped", async || (member.ask("current").await == "none").then_some(()))
                .await;
            assert!(member.ask("token").await.contains("nobody has logged in"));
        }
        world.redis.kill().await;
        world.redis.restart().await;
        eventually("the watchers have looked", async || {
            let keys: Vec<String> = world.redis.run("KEYS *:news").await;
            (!keys.is_empty()).then_some(())
        })
        .await;
        assert!(first.ask("token").await.contains("nobody has logged in"));
        assert!(
            world
                .status()
                .await
                .is_none_or(|status| status.token.is_none() && status.refresh_token.is_none())
        );
    }
}

/// Members that start without the store fetch alone, and come together when it is there.
#[tokio::test]
async fn members_come_together_when_the_store_comes() {
    let Some(mut world) = World::start().await else { return };
    world.redis.kill().await;
    let [mut first, mut second] = world.members(|launch| launch);
    let tokens = [first.token().await, second.token().await];
    assert_ne!(tokens[0], tokens[1]);
    assert_eq!(world.issuer.token_requests(), 2);
    world.redis.restart().await;
    let known =
        eventually("the store is filled", async || world.status().await.and_then(|status| status.token))
            .await;
    let [mut third] = world.members(|launch| launch);
    let token = third.token().await;
    assert_eq!(token, format!("token {known}"));
    assert!(tokens.contains(&token));
    assert_eq!(world.issuer.token_requests(), 2);
}

/// A login is not spent without the store.
#[tokio::test]
async fn a_login_is_not_spent_without_the_store() {
    let Some(world) = World::start().await else { return };
    world.log_in().await;
    let line = Forwarder::to(world.redis.address()).await;
    let launch = || world.launch().login().with("STORE", line.url());
    for failing in [Line::Cut, Line::Silent] {
        line.set(failing);
        let answer = launch().start().ask("token").await;
        assert!(answer.starts_with("RefreshFailed: ") && answer.contains("the fleet's store"), "{answer}");
        assert_eq!(world.issuer.token_requests(), 0);
    }
    line.set(Line::Open);
    launch().start().token().await;
    assert_eq!(world.issuer.reused_refresh_tokens(), 0);
}

/// A line that is slow, cut or silent fails no request as long as the token is valid.
#[tokio::test]
async fn a_line_that_fails_costs_no_request() {
    let Some(world) = World::start().await else { return };
    let line = Forwarder::to(world.redis.address()).await;
    line.set(Line::Slow(Duration::from_millis(50)));
    let mut far = world.launch().with("STORE", line.url()).start();
    let mut near = world.launch().start();
    let token = far.token().await;
    assert_eq!(near.token().await, token);
    for failing in [Line::Cut, Line::Silent, Line::Slow(Duration::from_millis(400))] {
        line.set(failing);
        let answer = far.ask("load 300").await;
        assert!(answer.starts_with("failed 0,"), "{answer}");
    }
    // Rejections pass between members again once the line is open.
    line.set(Line::Open);
    near.ask("reject").await;
    let next = near.token().await;
    eventually("the rejection arrives", async || (far.ask("current").await != token).then_some(())).await;
    assert_eq!(far.token().await, next);
    assert_eq!(world.issuer.token_requests(), 2);
}

/// N2: a write whose reply is lost is recognised: nothing is fetched or spent again.
#[tokio::test]
async fn a_lost_reply_loses_nothing() {
    // The claim, the next refresh token if there is a login, and the access token.
    for (is_login, nth) in [(false, 1), (false, 2), (true, 1), (true, 2), (true, 3)] {
        let Some(world) = World::start().await else { return };
        if is_login {
            world.log_in().await;
        }
        let mode = |launch: Launch| if is_login { launch.login() } else { launch };
        let line = Forwarder::to(world.redis.address()).await;
        let mut member = mode(world.launch()).with("STORE", line.url()).start();
        line.set(Line::LosesReply(nth));
        let token = member.token().await;
        assert_eq!(line.line(), Line::Open, "a reply was lost");
        let [mut other] = world.members(mode);
        assert_eq!(other.token().await, token, "write {nth}");
        assert_eq!(world.issuer.token_requests(), 1, "write {nth}");
        assert_eq!(world.issuer.reused_refresh_tokens(), 0);
    }
}

/// A failover to a replica that has not seen the last write: the member that made it puts it there.
#[tokio::test]
async fn a_failover_loses_nothing_that_a_member_knows() {
    for is_login in [false, true] {
        let Some(world) = World::start().await else { return };
        let Some(replica) = RedisServer::start().await else { return };
        if is_login {
            world.log_in().await;
        }
        let port = world.redis.address().port();
        let () = replica.run(&format!("REPLICAOF 127.0.0.1 {port}")).await;
        eventually("it is in step", async || {
            let state: String = replica.run("INFO replication").await;
            state.contains("master_link_status:up").then_some(())
        })
        .await;
        // From here on it misses the writes.
        let () = replica.run("REPLICAOF NO ONE").await;
        let line = Forwarder::to(world.redis.address()).await;
        let launch = || {
            let launch = world.launch().with("STORE", line.url());
            if is_login { launch.login() } else { launch }
        };
        let (mut member, mut other) = (launch().start(), launch().start());
        let token = member.token().await;
        line.lead_to(replica.address());
        let promoted = join(&replica).await;
        eventually("it is mended", async || promoted.status("selam").await.unwrap()?.token).await;
        assert_eq!(other.token().await, token);
        assert_eq!((world.issuer.token_requests(), world.issuer.reused_refresh_tokens()), (1, 0));
    }
}
