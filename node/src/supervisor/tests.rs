//! The five ways in which a task may end.

use super::*;

const GRACE: Duration = Duration::from_secs(10);

/// A task that stops when it is told to.
async fn obedient(stop: CancellationToken) -> Result<(), TaskError> {
    stop.cancelled().await;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn asked_to_stop_it_stops_well() {
    let stop = CancellationToken::new();
    let mut tasks = Supervisor::new(stop.clone());
    tasks.spawn("a", obedient);
    tasks.spawn("b", obedient);
    tasks.spawn("asker", |_| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        stop.cancel();
        Ok(())
    });
    assert!(tasks.run(GRACE).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_task_that_fails_stops_the_others_and_is_reported() {
    let stop = CancellationToken::new();
    let mut tasks = Supervisor::new(stop.clone());
    tasks.spawn("steady", obedient);
    tasks.spawn("broken", |_| async { Err("no such disk".into()) });
    let error = tasks.run(GRACE).await.unwrap_err();
    assert_eq!(Chain(&error).to_string(), "task broken failed: no such disk");
    assert!(stop.is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_task_that_ends_early_is_a_failure() {
    let mut tasks = Supervisor::new(CancellationToken::new());
    tasks.spawn("steady", obedient);
    tasks.spawn("server", |_| async { Ok(()) });
    let error = tasks.run(GRACE).await.unwrap_err();
    assert_eq!(error.to_string(), "task server ended before it was told to");
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_reported_with_its_name_and_words() {
    let mut tasks = Supervisor::new(CancellationToken::new());
    tasks.spawn("steady", obedient);
    tasks.spawn("hasty", |_| async { panic!("index {} is beyond the end", 7) });
    let error = tasks.run(GRACE).await.unwrap_err();
    assert_eq!(error.to_string(), "task hasty panicked: index 7 is beyond the end");
}

#[tokio::test(start_paused = true)]
async fn a_deaf_task_is_named_when_the_grace_is_over() {
    let stop = CancellationToken::new();
    let mut tasks = Supervisor::new(stop.clone());
    tasks.spawn("steady", obedient);
    tasks.spawn("deaf", |_| std::future::pending());
    stop.cancel();
    let before = tokio::time::Instant::now();
    let error = tasks.run(GRACE).await.unwrap_err();
    assert_eq!(before.elapsed(), GRACE);
    assert_eq!(error.to_string(), "one task still ran 10s after the stop: deaf");
}
