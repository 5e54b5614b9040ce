//! Calls that begin and do not finish, on paused time.

use std::convert::Infallible;

use axum::Router;
use axum::http::{Request, Response};
use axum::routing::post;
use futures::{FutureExt, SinkExt, channel::mpsc};
use tonic::Code;
use tower::ServiceExt;

use super::super::grpc::{CallLimits, Concurrency, Method, with_limits};
use super::super::requests::Tracked;
use super::super::table::{Admission, Table};
use super::*;

const SECOND: Duration = Duration::from_secs(1);

type Sender = mpsc::Sender<Result<Bytes, Infallible>>;

fn limits(message_bytes: usize, first: Option<Duration>) -> MessageLimits {
    MessageLimits { message_bytes, first, whole: 10 * SECOND, single: false }
}

fn message(length: usize) -> Bytes {
    let prefix = u32::try_from(length).unwrap().to_be_bytes();
    [&[0], prefix.as_slice(), &vec![7; length]].concat().into()
}

fn call(limits: MessageLimits, all: &Arc<Unfinished>) -> (Sender, Messages) {
    let (sender, receiver) = mpsc::channel(1 << 10);
    (sender, Messages::new(Body::from_stream(receiver), limits, all, None))
}

async fn next(messages: &mut Messages) -> Option<Result<Bytes, Status>> {
    let frame = poll_fn(|context| Pin::new(&mut *messages).poll_frame(context)).await?;
    Some(frame.map(|frame| frame.into_data().unwrap()))
}

/// What has come so far, if anything has.
fn now(messages: &mut Messages) -> Option<Result<Bytes, Status>> {
    next(messages).now_or_never().flatten()
}

/// Bytes and messages that are unfinished.
fn held(all: &Unfinished) -> (usize, usize) {
    let begun = all.begun();
    (begun.bytes, begun.messages.len())
}

async fn everything(messages: &mut Messages) -> Result<Vec<u8>, Status> {
    let mut bytes = Vec::new();
    while let Some(part) = next(messages).await {
        bytes.extend_from_slice(&part?);
    }
    Ok(bytes)
}

#[tokio::test(start_paused = true)]
async fn messages_pass_unchanged_however_they_are_cut() {
    let all = Unfinished::new(1 << 20, 10);
    let whole = [message(0), message(3), message(70_000), message(9)].concat();
    for cut in [1, 2, 4, 5, 6, 7, 100, 4096, 5000, 70_000, whole.len()] {
        let (mut sender, mut messages) = call(limits(70_000, None), &all);
        let sending = async {
            for part in whole.chunks(cut) {
                sender.send(Ok(Bytes::copy_from_slice(part))).await.unwrap();
            }
            drop(sender);
        };
        let ((), passed) = futures::join!(sending, everything(&mut messages));
        assert!(passed.unwrap() == whole, "cut into {cut}");
        assert_eq!(held(&all), (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_of_one_message_ends_with_it_whatever_its_client_does() {
    let all = Unfinished::new(1 << 20, 10);
    let limits = MessageLimits { single: true, ..limits(100, Some(SECOND)) };
    let (mut sender, mut messages) = call(limits, &all);
    // Another follows, and the client never says that it has finished.
    sender.send(Ok([message(3), message(4)].concat().into())).await.unwrap();
    assert_eq!(everything(&mut messages).await.unwrap(), message(3));
    assert_eq!(held(&all), (0, 0));
    drop(sender);
}

#[tokio::test(start_paused = true)]
async fn no_part_passes_before_the_message_is_whole() {
    let all = Unfinished::new(1 << 20, 10);
    let (mut sender, mut messages) = call(limits(100, None), &all);
    let whole = message(100);
    sender.send(Ok(whole.slice(..104))).await.unwrap();
    assert!(now(&mut messages).is_none());
    assert_eq!(all.begun().bytes, 104);
    sender.send(Ok(whole.slice(104..))).await.unwrap();
    let mut passed = now(&mut messages).unwrap().unwrap().to_vec();
    while let Some(part) = now(&mut messages) {
        passed.extend_from_slice(&part.unwrap());
    }
    assert_eq!(passed, whole);
    assert_eq!(all.begun().bytes, 0);
}

#[tokio::test(start_paused = true)]
async fn half_messages_are_bounded_and_the_oldest_goes() {
    let all = Unfinished::new(1000, 10);
    let mut calls: Vec<(Sender, Messages)> =
        (0..8).map(|_| call(limits(1000, None), &all)).collect();
    for (sender, messages) in &mut calls {
        sender.send(Ok(message(900).slice(..400))).await.unwrap();
        assert!(now(messages).is_none());
        assert!(all.begun().bytes <= 1000);
    }
    assert_eq!(all.begun().messages.len(), 2);
    for (index, (_, messages)) in calls.iter_mut().enumerate() {
        match index {
            0..6 => {
                let status = now(messages).unwrap().unwrap_err();
                assert_eq!(status.code(), Code::ResourceExhausted, "{index}");
                assert!(messages.partial.parts.is_empty() && messages.partial.small.is_empty());
            }
            _ => assert!(now(messages).is_none(), "{index}"),
        }
    }
    drop(calls);
    assert_eq!(held(&all), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_finished_messages_before_outlives_those_that_never_did() {
    let all = Unfinished::new(1000, 10);
    let (mut honest, mut messages) = call(limits(1000, None), &all);
    honest.send(Ok(message(10))).await.unwrap();
    assert!(now(&mut messages).is_some());
    honest.send(Ok(message(900).slice(..400))).await.unwrap();
    assert!(now(&mut messages).is_none());
    let mut strangers: Vec<(Sender, Messages)> =
        (0..8).map(|_| call(limits(1000, None), &all)).collect();
    for (sender, stranger) in &mut strangers {
        sender.send(Ok(message(900).slice(..400))).await.unwrap();
        assert!(now(stranger).is_none());
    }
    assert!(now(&mut messages).is_none(), "not cut");
    honest.send(Ok(message(900).slice(400..))).await.unwrap();
    assert!(now(&mut messages).unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn one_message_of_the_largest_size_always_passes() {
    let all = Unfinished::new(1000, 1);
    let (mut sender, mut messages) = call(limits(1000, None), &all);
    for part in message(1000).chunks(10) {
        sender.send(Ok(Bytes::copy_from_slice(part))).await.unwrap();
        if let Some(passed) = now(&mut messages) {
            passed.unwrap();
        }
    }
    assert!(messages.proven);
}

#[tokio::test(start_paused = true)]
async fn what_has_begun_must_end_in_time_and_dripping_does_not_help() {
    let all = Unfinished::new(1000, 10);
    let (mut sender, mut messages) = call(limits(1000, None), &all);
    let dripping = async {
        for byte in message(900) {
            if sender.send(Ok(Bytes::copy_from_slice(&[byte]))).await.is_err() {
                break;
            }
            tokio::time::sleep(SECOND).await;
        }
    };
    let started = Instant::now();
    let reading = async {
        let status = next(&mut messages).await.unwrap().unwrap_err();
        drop(messages);
        status
    };
    let (status, ()) = futures::join!(reading, dripping);
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(started.elapsed() < 12 * SECOND, "{:?}", started.elapsed());
    // Between messages a stream may be quiet, and before the first if it has no deadline.
    let (_sender, mut messages) = call(limits(1000, None), &all);
    assert!(tokio::time::timeout(1000 * SECOND, next(&mut messages)).await.is_err());
    let (_sender, mut messages) = call(limits(1000, Some(5 * SECOND)), &all);
    assert_eq!(messages.first().await.unwrap_err().code(), Code::DeadlineExceeded);
}

#[tokio::test(start_paused = true)]
async fn too_large_and_broken_off_are_said() {
    let all = Unfinished::new(1000, 10);
    let (mut sender, mut messages) = call(limits(100, None), &all);
    sender.send(Ok(message(101).slice(..5))).await.unwrap();
    let status = now(&mut messages).unwrap().unwrap_err();
    assert_eq!(status.message(), "a message has 101 bytes, the most is 100");
    let (mut sender, mut messages) = call(limits(100, None), &all);
    sender.send(Ok(message(100).slice(..50))).await.unwrap();
    drop(sender);
    assert_eq!(next(&mut messages).await.unwrap().unwrap_err().code(), Code::InvalidArgument);
}

/// A server whose `/s/Slow` never answers and whose `/s/Quick` does.
fn server(places: usize, unfinished_messages: usize) -> Router {
    let limits = CallLimits {
        first_message: 5 * SECOND,
        whole_message: 10 * SECOND,
        unfinished_bytes: 10_000,
        unfinished_messages,
        answer: Some(60 * SECOND),
    };
    let methods = vec![
        Method::unary("/s/Slow", 1000).with_concurrency(&Concurrency::until_answered(places)),
        Method::unary("/s/Quick", 1000),
    ];
    let router = Router::new()
        .route("/s/Slow", post(async || std::future::pending::<()>().await))
        .route("/s/Quick", post(async |body: Bytes| body));
    with_limits(router, methods, limits)
}

async fn ask(server: &Router, path: &str, body: Body) -> Response<Body> {
    server.clone().oneshot(Request::post(path).body(body).unwrap()).await.unwrap()
}

/// The status that an answer ends with.
fn code(response: &Response<Body>) -> Code {
    let code = response.headers().get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()));
    code.unwrap_or(Code::Ok)
}

#[tokio::test(start_paused = true)]
async fn half_calls_take_no_place_and_end_in_time() {
    let server = server(2, 1000);
    let half = |first: &'static [u8]| {
        let server = server.clone();
        async move {
            let (mut sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
            sender.send(Ok(Bytes::from_static(first))).await.unwrap();
            let response = ask(&server, "/s/Slow", Body::from_stream(receiver)).await;
            drop(sender);
            code(&response)
        }
    };
    let started = Instant::now();
    let halves = futures::future::join_all(
        (0..600).map(|index| half([b"".as_slice(), b"\0\0\0\0\x09half"][index % 2])),
    );
    let honest = async {
        tokio::time::sleep(SECOND).await;
        for _ in 0..10 {
            let response = ask(&server, "/s/Quick", Body::from(message(3))).await;
            let body = axum::body::to_bytes(response.into_body(), 100).await.unwrap();
            assert_eq!(body, message(3));
        }
        // Both places are free: these two wait for their answer, a third hears at once.
        let slow = || ask(&server, "/s/Slow", Body::from(message(3)));
        let two = futures::future::join(slow(), slow());
        let third = async {
            tokio::time::sleep(SECOND).await;
            let asked = Instant::now();
            assert_eq!(code(&slow().await), Code::ResourceExhausted);
            assert_eq!(asked.elapsed(), Duration::ZERO);
        };
        let (two, ()) = futures::join!(two, third);
        assert_eq!((code(&two.0), code(&two.1)), (Code::DeadlineExceeded, Code::DeadlineExceeded));
        started.elapsed()
    };
    let (codes, honest) = futures::join!(async { (halves.await, started.elapsed()) }, honest);
    assert!(codes.0.iter().all(|code| *code == Code::DeadlineExceeded));
    assert!(codes.1 < 11 * SECOND && honest >= 60 * SECOND, "{:?} {honest:?}", codes.1);
}

#[tokio::test(start_paused = true)]
async fn beyond_so_many_half_calls_the_oldest_makes_room() {
    let server = server(2, 4);
    let (_sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    let oldest = ask(&server, "/s/Quick", Body::from_stream(receiver));
    let others = futures::future::join_all((0..4).map(|_| async {
        let (_sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
        ask(&server, "/s/Quick", Body::from_stream(receiver)).await
    }));
    let (oldest, others) = futures::join!(oldest, others);
    assert_eq!(code(&oldest), Code::ResourceExhausted);
    assert!(others.iter().all(|other| code(other) != Code::ResourceExhausted));
}

#[tokio::test(start_paused = true)]
async fn an_unknown_method_waits_for_nothing() {
    let (_sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    let started = Instant::now();
    let response = ask(&server(1, 1), "/s/Other", Body::from_stream(receiver)).await;
    assert_eq!((code(&response), started.elapsed()), (Code::Unimplemented, Duration::ZERO));
}

/// What ends a quiet call, if anything has so far.
fn ended(messages: &mut Messages) -> Option<Code> {
    now(messages).map(|passed| passed.unwrap_err().code())
}

#[tokio::test(start_paused = true)]
async fn quiet_calls_of_strangers_are_bounded_and_those_of_the_known_are_not_cut() {
    let (all, strangers) = (Unfinished::new(1000, 10), Unfinished::new(usize::MAX, 2));
    let quiet = || {
        let (sender, messages) = call(limits(1000, None), &all);
        let quiet = QuietCall::begin(&strangers, None);
        (sender, messages.of_quiet(quiet.clone()), quiet)
    };
    let (_sender, mut known, its) = quiet();
    its.admit();
    let mut calls: Vec<_> = (0..4).map(|_| quiet()).collect();
    assert_eq!(held(&strangers).1, 2);
    tokio::time::sleep(1000 * SECOND).await;
    assert_eq!(ended(&mut known), None);
    let codes: Vec<_> = calls.iter_mut().map(|(_, messages, _)| ended(messages)).collect();
    let cut = Some(Code::Aborted);
    assert_eq!(codes, [cut, cut, None, None]);
    // What a stranger sends passes, and makes it none that is known.
    let (sender, messages, _) = &mut calls[2];
    sender.send(Ok(message(3))).await.unwrap();
    assert_eq!(now(messages).unwrap().unwrap(), message(3));
    assert_eq!(held(&strangers).1, 2);
    drop(calls);
    assert_eq!((held(&strangers), held(&all)), ((0, 0), (0, 0)));
}

#[tokio::test(start_paused = true)]
async fn a_quiet_call_has_arrived_when_the_service_knows_its_caller() {
    let limits = CallLimits {
        first_message: 5 * SECOND,
        whole_message: 10 * SECOND,
        unfinished_bytes: 10_000,
        unfinished_messages: 10,
        answer: None,
    };
    let (tell, told) = std::sync::mpsc::channel::<QuietCall>();
    let route = post(async move |request: Request<Body>| {
        tell.send(request.extensions().get::<QuietCall>().unwrap().clone()).unwrap();
        Body::from_stream(futures::stream::pending::<Result<Bytes, Infallible>>())
    });
    let methods = vec![Method::streaming("/s/Quiet", 1000).with_quiet_clients()];
    let server = with_limits(Router::new().route("/s/Quiet", route), methods, limits);
    for is_known in [true, false] {
        let table = Table::new("test", 1, SECOND);
        let Admission::Entered(place) = table.admit(Instant::now()) else { panic!("it is empty") };
        let peer = (None, "127.0.0.1:1".parse().unwrap());
        let mut tracked = Tracked::new(server.clone(), Arc::clone(&place.activity), peer, SECOND);
        let (_sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
        let request = Request::post("/s/Quiet").body(Body::from_stream(receiver)).unwrap();
        let answer = tower::Service::call(&mut tracked, request).await.unwrap();
        let mut reading = Box::pin(axum::body::to_bytes(answer.into_body(), 100));
        assert!((&mut reading).now_or_never().is_none());
        tokio::time::sleep(2 * SECOND).await;
        let quiet = told.recv().unwrap();
        if is_known {
            quiet.admit();
        }
        let makes_room = matches!(table.admit(Instant::now()), Admission::Wait(_));
        assert_eq!(makes_room, !is_known);
        assert_eq!(place.must_end().is_some(), !is_known);
    }
}

#[tokio::test(start_paused = true)]
async fn a_stranger_who_opens_no_window_loses_its_connection_when_its_call_is_cut() {
    /// As many as may be open.
    const OTHERS: usize = 256;
    let limits = CallLimits {
        first_message: 5 * SECOND,
        whole_message: 10 * SECOND,
        unfinished_bytes: 10_000,
        unfinished_messages: 1000,
        answer: None,
    };
    // Whoever serves it hears of its messages when the client takes something of the answer.
    let route = post(async |request: Request<Body>| Response::new(request.into_body()));
    let methods = vec![Method::streaming("/s/Quiet", 1000).with_quiet_clients()];
    let server = with_limits(Router::new().route("/s/Quiet", route), methods, limits);
    let table = Table::new("test", 2, SECOND);
    let connection = || {
        let Admission::Entered(place) = table.admit(Instant::now()) else { panic!("it is empty") };
        let peer = (None, "127.0.0.1:1".parse().unwrap());
        let tracked = Tracked::new(server.clone(), Arc::clone(&place.activity), peer, SECOND);
        (place, tracked)
    };
    let request = || {
        let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
        (sender, Request::post("/s/Quiet").body(Body::from_stream(receiver)).unwrap())
    };
    let (shut, mut stranger) = connection();
    let (_open, asked) = request();
    // With a shut window nothing of it is asked for.
    let _unread = tower::Service::call(&mut stranger, asked).await.unwrap();
    let (reads, mut honest) = connection();
    let mut calls = Vec::new();
    for _ in 0..OTHERS {
        let (sender, asked) = request();
        let answer = tower::Service::call(&mut honest, asked).await.unwrap();
        assert!(answer.status().is_success(), "no call is refused");
        let mut body = answer.into_body();
        let part = poll_fn(|context| Poll::Ready(Pin::new(&mut body).poll_frame(context))).await;
        assert!(part.is_pending());
        calls.push((sender, body));
    }
    let timeouts = super::super::Timeouts::USUAL;
    let due = |place: &super::super::table::Place| place.activity.deadline(&timeouts);
    assert_eq!(due(&shut).map(|(at, _)| at), Some(Instant::now() + SECOND));
    assert_eq!(due(&reads), None);
}
