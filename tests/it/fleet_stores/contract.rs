//! What every `FleetStore` has to do. Also included by the tests with Redis, in `tests/fleet/`.

use std::{sync::Arc, time::Duration};

use tokio::{
    task::{JoinSet, yield_now},
    time::{Instant, timeout},
};
use tower_selam::fleet::{Entry, FleetStore, Put, Revision, Write};

/// Makes each function below a test of a store. `$open` returns a guard and the store.
macro_rules! contract {
    ($name:ident, $open:expr) => {
        mod $name {
            use super::*;

            contract!(@tests $open,
                writes_are_conditional,
                a_repeated_write_meets_itself,
                one_of_many_writers_wins,
                entries_expire,
                ages_count_up,
                values_are_binary,
                keys_are_told_apart
            );
        }
    };
    (@tests $open:expr, $($test:ident),+) => {$(
        /// N6
        #[tokio::test(flavor = "multi_thread")]
        async fn $test() {
            let (_guard, store) = $open;
            super::contract::$test(store).await;
        }
    )+};
}
pub(crate) use contract;

const KEY: &str = "selam:billing:c29tZS1uYW1l";
const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn revision(number: u8) -> Revision {
    // With a zero and a byte that is not UTF-8.
    let mut bytes = [0xff; 16];
    (bytes[0], bytes[15]) = (0, number);
    Revision::from_bytes(bytes)
}

async fn held(store: &impl FleetStore) -> Option<(Revision, Vec<u8>)> {
    store.get(KEY).await.unwrap().map(content)
}

fn content(entry: Entry) -> (Revision, Vec<u8>) {
    (entry.revision, entry.value)
}

/// Writes, and returns what stands there instead, if anything does.
async fn put(store: &impl FleetStore, write: Write<'_>) -> Result<(), Option<(Revision, Vec<u8>)>> {
    match store.put(KEY, write).await.unwrap() {
        Put::Done => Ok(()),
        Put::Conflict(found) => Err(found.map(content)),
    }
}

/// Waits until the entry is as `is_met` says.
async fn until(store: &impl FleetStore, is_met: impl Fn(Option<Entry>) -> bool) {
    let met = async {
        while !is_met(store.get(KEY).await.unwrap()) {
            yield_now().await;
        }
    };
    timeout(LIMIT, met).await.unwrap();
}

pub(crate) async fn writes_are_conditional(store: impl FleetStore) {
    let [first, second, other] = [1, 2, 3].map(revision);
    assert_eq!(held(&store).await, None);
    assert_eq!(put(&store, Write::new(Some(other), first, b"x")).await, Err(None));
    assert_eq!(held(&store).await, None);
    assert_eq!(put(&store, Write::new(None, first, b"one")).await, Ok(()));
    let one = Some((first, b"one".to_vec()));
    assert_eq!(held(&store).await, one);
    for expected in [None, Some(other), Some(second)] {
        assert_eq!(put(&store, Write::new(expected, second, b"x")).await, Err(one.clone()));
    }
    assert_eq!(held(&store).await, one);
    assert_eq!(put(&store, Write::new(Some(first), second, b"two")).await, Ok(()));
    let two = Some((second, b"two".to_vec()));
    assert_eq!(put(&store, Write::new(Some(first), other, b"x")).await, Err(two.clone()));
    assert_eq!(held(&store).await, two);
}

/// After a lost reply, the same write is sent again.
pub(crate) async fn a_repeated_write_meets_itself(store: impl FleetStore) {
    let [first, second] = [1, 2].map(revision);
    for (expected, revision) in [(None, first), (Some(first), second)] {
        let write = Write::new(expected, revision, b"value");
        assert_eq!(put(&store, write).await, Ok(()));
        let itself = Some((revision, b"value".to_vec()));
        assert_eq!(put(&store, write).await, Err(itself.clone()));
        assert_eq!(held(&store).await, itself);
    }
}

/// 64 tasks count to 64: none overwrites another, and the losers see who won.
pub(crate) async fn one_of_many_writers_wins(store: impl FleetStore) {
    const TASKS: u8 = 64;
    let store = Arc::new(store);
    let mut tasks: JoinSet<_> = (0..TASKS).map(|number| count(Arc::clone(&store), number)).collect();
    let mut counted = Vec::new();
    while let Some(count) = timeout(LIMIT, tasks.join_next()).await.unwrap() {
        counted.push(count.unwrap());
    }
    counted.sort_unstable();
    assert_eq!(counted, (1..=TASKS).collect::<Vec<_>>());
    assert_eq!(held(&*store).await.unwrap().1, [TASKS]);
}

async fn count(store: Arc<impl FleetStore>, number: u8) -> u8 {
    let mut found = None;
    loop {
        let next = found.as_ref().map_or(1, |(_, value): &(_, Vec<u8>)| value[0] + 1);
        let expected = found.map(|(revision, _)| revision);
        match put(&*store, Write::new(expected, revision(number), &[next])).await {
            Ok(()) => return next,
            Err(winner) => {
                assert!(winner.as_ref().is_some_and(|(_, value)| value[0] >= next), "{winner:?}");
                found = winner;
            }
        }
    }
}

/// Entries end after their time, also when a longer one was set before; those for good stay.
pub(crate) async fn entries_expire(store: impl FleetStore) {
    const GOOD: &str = "selam:billing:for-good";
    let (soon, later) = (Duration::from_millis(40), Duration::from_secs(60));
    let [first, second, third] = [1, 2, 3].map(revision);
    loop {
        store.put(GOOD, Write::new(None, first, b"").with_keep(soon)).await.unwrap();
        match store.put(GOOD, Write::new(Some(first), second, b"")).await.unwrap() {
            Put::Done => break,
            // The machine was slow, and the first entry has ended.
            Put::Conflict(found) => assert!(found.is_none(), "{found:?}"),
        }
    }

    put(&store, Write::new(None, first, b"").with_keep(later)).await.unwrap();
    put(&store, Write::new(Some(first), second, b"").with_keep(soon)).await.unwrap();
    until(&store, |entry| entry.is_none()).await;
    assert_eq!(put(&store, Write::new(Some(second), third, b"")).await, Err(None));
    assert!(store.get(GOOD).await.unwrap().is_some());

    put(&store, Write::new(None, third, b"").with_keep(Duration::MAX)).await.unwrap();
    assert!(held(&store).await.is_some());
}

pub(crate) async fn ages_count_up(store: impl FleetStore) {
    let [first, second] = [1, 2].map(revision);
    put(&store, Write::new(None, first, b"")).await.unwrap();
    let aged = Duration::from_millis(50);
    until(&store, |entry| entry.unwrap().age >= aged).await;
    let Ok(Put::Conflict(Some(found))) = store.put(KEY, Write::new(None, second, b"")).await else {
        panic!()
    };
    assert!(found.age >= aged);

    let start = Instant::now();
    put(&store, Write::new(Some(first), second, b"")).await.unwrap();
    let entry = store.get(KEY).await.unwrap().unwrap();
    // A store may count in whole milliseconds.
    assert!(entry.age <= start.elapsed() + Duration::from_millis(2), "{:?}", entry.age);
}

/// All bytes, none, and 1 MiB: no store refuses large values.
pub(crate) async fn values_are_binary(store: impl FleetStore) {
    let all: Vec<u8> = (0..=u8::MAX).collect();
    let mut expected = None;
    for (number, value) in (1..).zip([&all[..], b"", b"\r\n$-1\r\n", b"0", &all.repeat(4096)]) {
        put(&store, Write::new(expected, revision(number), value)).await.unwrap();
        assert_eq!(held(&store).await.unwrap().1, value);
        expected = Some(revision(number));
    }
}

/// File systems may ignore case.
pub(crate) async fn keys_are_told_apart(store: impl FleetStore) {
    let keys =
        ["selam:a:Name", "selam:a:name", "selam:a:name ", "selam:b:name", "selam.a.name", "../name", "*"];
    for (number, key) in (1..).zip(keys) {
        let put = store.put(key, Write::new(None, revision(number), key.as_bytes())).await.unwrap();
        assert!(matches!(put, Put::Done), "{key}");
    }
    for key in keys {
        assert_eq!(store.get(key).await.unwrap().unwrap().value, key.as_bytes());
    }
}
