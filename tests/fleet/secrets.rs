//! S2, N3: what can be read in Redis, its backups and the logs; keys, users and fleets that do not mix.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use tower_selam::{
    BoxError, Refreshing, Token,
    fleet::{Fleet, FleetLogin, RedisStore, SealingKey},
    oauth::{OAuthSource, RefreshToken, RefreshTokenStore},
    source::{Reason, source_fn},
};

use crate::support::{KEY, RedisServer, World};

const OTHER_KEY: &str = "AQECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8";

/// The documentation has the user's rights.
const DOCS: &str = include_str!("../../src/fleet/redis.rs");

/// S2: no token, refresh token, client secret or user name shows in `MONITOR`, a dump, or a log at the finest level.
#[tokio::test]
async fn no_secret_shows() {
    let Some(world) = World::start().await else { return };
    let monitor = world.redis.monitor().await;
    let parent = world.log_in().await;
    let [mut first, mut second] = world.members(|launch| launch.login().with("LOG", "1"));
    first.token().await;
    second.ask("reject").await;
    assert!(second.ask("user ada.lovelace@example.com").await.starts_with("token "));
    first.ask("reject").await;
    second.token().await;
    let user = first.ask("user ada.lovelace@example.com").await;
    assert!(user.starts_with("token "), "{user}");

    let (access, child) = held(&world).await;
    assert_ne!(parent, child);
    let () = world.redis.run("SAVE").await;
    let dump = fs::read(world.redis.folder().path().join("dump.rdb")).unwrap();
    let calls = monitor.stop().await;
    let logs = [first.log(), second.log()].concat();
    // They are what they should be.
    assert!(calls.contains("\"EVAL\"") && calls.contains("selam:billing:"), "{calls}");
    assert!(dump.starts_with(b"REDIS") && logs.contains("TRACE"));
    let texts = [("MONITOR", calls.as_bytes()), ("the dump", &dump), ("a log", logs.as_bytes())];
    for (place, text) in texts {
        for secret in [&*access, &parent, &child, world.client_secret(), KEY, "lovelace"] {
            let shows = text.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!shows, "{secret} shows in {place}");
        }
    }
}

/// Reads the access token and the refresh token as members of the fleet do.
async fn held(world: &World) -> (String, String) {
    let fleet = world.fleet().await;
    let source = |login| OAuthSource::refresh_token(world.token_endpoint(), login);
    let access = Refreshing::new(fleet.share_login("selam", source)).token().await.unwrap();

    // It asks for something else than the others, so it does not adopt their token, but is to spend the refresh token.
    let found = Arc::new(Mutex::new(None));
    let spender = Refreshing::new(fleet.share_login("selam", |login: FleetLogin| {
        let (login, found) = (Arc::new(login), Arc::clone(&found));
        source_fn(move |_: Reason<Token>| {
            let (login, found) = (Arc::clone(&login), Arc::clone(&found));
            async move {
                *found.lock().unwrap() = login.load().await?;
                Err::<Token, BoxError>("it spends nothing".into())
            }
        })
    }));
    assert!(spender.token().await.is_err());
    let login = found.lock().unwrap().take().unwrap();
    (access.expose_secret().to_owned(), login.expose_secret().to_owned())
}

/// N3: a member with another key fetches alone, spends no login, and changes nothing in the store.
#[tokio::test]
async fn another_key_changes_nothing() {
    let Some(world) = World::start().await else { return };
    let [mut member] = world.members(|launch| launch);
    let token = member.token().await;
    let before = world.status().await;
    let [mut stranger] = world.members(|launch| launch.with("KEY", OTHER_KEY));
    assert_ne!(stranger.token().await, token);
    let after = world.status().await;
    assert_eq!(before.map(|status| status.generation), after.map(|status| status.generation));

    let Some(world) = World::start().await else { return };
    world.log_in().await;
    let [mut stranger] = world.members(|launch| launch.login().with("KEY", OTHER_KEY));
    let answer = stranger.ask("token").await;
    assert!(answer.contains("sealed with a key that this member does not have"), "{answer}");
    assert_eq!(world.issuer.token_requests(), 0);
    let [mut member] = world.members(|launch| launch.login());
    member.token().await;
}

/// N3: keys are rotated in three steps, while the members run.
#[tokio::test]
async fn keys_rotate_without_a_fetch() {
    let Some(world) = World::start().await else { return };
    let step = |key, former| world.launch().with("KEY", key).with("FORMER_KEY", former).start();
    let mut old = world.launch().start();
    let token = old.token().await;
    let mut both = [step(KEY, OTHER_KEY), step(OTHER_KEY, KEY)];
    for member in &mut both {
        assert_eq!(member.token().await, token);
    }
    drop(old);
    // The next write seals with the new key.
    both[1].ask("reject").await;
    let next = both[1].token().await;
    assert_eq!(both[0].ask("token").await.len(), next.len());
    let [mut new] = world.members(|launch| launch.with("KEY", OTHER_KEY));
    assert_eq!(new.token().await, next);
    assert_eq!(world.issuer.token_requests(), 2);
}

/// The documented user can do all that a fleet does, and nothing under another name.
#[tokio::test]
async fn the_documented_user_suffices() {
    let Some(server) = RedisServer::start().await else { return };
    let rights = DOCS.lines().find_map(|line| line.strip_prefix("/// ACL SETUSER ")).unwrap();
    let () = server.run(&format!("ACL SETUSER {rights}")).await;
    let url = server.url().replace("redis://", "redis://selam-billing:password@");
    let store = || async {
        let client = redis::Client::open(&*url).unwrap();
        RedisStore::new(redis::aio::ConnectionManager::new(client).await.unwrap())
    };
    let join = |name, store| Fleet::new(name, store, SealingKey::from_base64(KEY).unwrap()).unwrap();

    let fleet = join("billing", store().await);
    let token = RefreshToken::new("from-the-login").unwrap();
    fleet.log_in("selam", &token).await.unwrap();
    assert!(fleet.status("selam").await.unwrap().is_some());
    let source = source_fn(|_: Reason<Token>| async { Ok::<_, BoxError>(Token::new("a.b.c")?) });
    Refreshing::new(fleet.share("user", source)).token().await.unwrap();
    assert!(fleet.status("user").await.unwrap().unwrap().token.is_some());
    fleet.forget("selam").await.unwrap();

    let other = join("billing-test", store().await);
    let refused = other.status("selam").await.unwrap_err();
    let text = std::iter::successors(Some(&*refused as &dyn std::error::Error), |error| error.source())
        .map(ToString::to_string)
        .collect::<String>();
    assert!(text.contains("NOPERM") || text.to_lowercase().contains("permission"), "{text}");
    assert!(!text.contains("password"), "{text}");
    let keys: Vec<String> = server.run("KEYS *").await;
    assert!(!keys.is_empty() && keys.iter().all(|key| key.starts_with("selam:billing:")), "{keys:?}");
}
