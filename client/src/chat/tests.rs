//! Orders, history, and what Ctrl-C does, against a scripted coordinator.

use super::*;
use crate::grpc::tests::{Scripted, answer};

#[test]
fn lines_are_messages_or_orders() {
    for (line, want) in [
        ("", Order::Nothing),
        ("   ", Order::Nothing),
        (" hello there ", Order::Say("hello there".into())),
        ("/exit", Order::Exit),
        ("/quit", Order::Exit),
        ("/reset", Order::Reset),
        ("/help", Order::Help),
        ("/system", Order::System(None)),
        ("/system  be kind ", Order::System(Some("be kind".into()))),
        ("/exit now", Order::Unknown("/exit".into())),
        ("/dance", Order::Unknown("/dance".into())),
    ] {
        assert_eq!(Order::parse(line), want, "{line:?}");
    }
}

fn messages(request: &GenerateRequest) -> Vec<(&str, &str)> {
    let Prompt::Conversation { messages, .. } = &request.prompt else { panic!("{request:?}") };
    messages.iter().map(|message| (&*message.role, &*message.content)).collect()
}

async fn never() -> Result<(), CommandError> {
    std::future::pending().await
}

#[tokio::test]
async fn the_history_goes_with_every_turn() {
    let server = Scripted::start(answer("I am fine"), false).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    let args = ChatArgs { system: Some("be kind".into()), ..ChatArgs::default() };
    let mut conversation = Conversation::new(&args);
    let mut bytes = Vec::new();
    let mut writer = TextWriter::new(&mut bytes, false);
    for message in ["how are you", "really?"] {
        say(&client, &mut conversation, message, false, &mut writer, never()).await.unwrap();
    }
    obey(&mut conversation, Order::Reset);
    say(&client, &mut conversation, "anew", false, &mut writer, never()).await.unwrap();
    obey(&mut conversation, Order::System(None));
    say(&client, &mut conversation, "plain", false, &mut writer, never()).await.unwrap();

    assert_eq!(String::from_utf8(bytes).unwrap(), "I am fine\n".repeat(4));
    let requests = server.requests();
    assert_eq!(messages(&requests[0]), [("system", "be kind"), ("user", "how are you")]);
    assert_eq!(
        messages(&requests[1]),
        [
            ("system", "be kind"),
            ("user", "how are you"),
            ("assistant", "I am fine"),
            ("user", "really?")
        ]
    );
    assert_eq!(messages(&requests[2]), [("system", "be kind"), ("user", "anew")]);
    assert_eq!(messages(&requests[3]), [("user", "plain")]);
}

/// A writer that says when something was written.
struct Noticing(tokio::sync::mpsc::Sender<()>);

impl Write for Noticing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.try_send(());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn an_interrupt_cancels_the_answer_and_keeps_what_was_seen() {
    let mut script = answer("once upon");
    script.pop();
    let mut server = Scripted::start(script, true).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    let mut conversation = Conversation::new(&ChatArgs::default());
    let (sender, mut written) = tokio::sync::mpsc::channel(16);
    let mut writer = TextWriter::new(Noticing(sender), false);
    let interrupted = async {
        written.recv().await.unwrap();
        written.recv().await.unwrap();
        Ok(())
    };
    say(&client, &mut conversation, "tell", false, &mut writer, interrupted).await.unwrap();
    server.dropped().await;
    assert_eq!(conversation.turns, [turn("user", "tell"), turn("assistant", "once upon")]);
}

#[tokio::test]
async fn a_turn_that_failed_can_be_said_again() {
    let full = tonic::Status::resource_exhausted("queue of 64 is full\u{1b}[2J\nerror: none");
    let server = Scripted::start(vec![Err(full)], false).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    let mut conversation = Conversation::new(&ChatArgs::default());
    let mut writer = TextWriter::new(Vec::new(), false);
    let said = say(&client, &mut conversation, "tell", false, &mut writer, never()).await;
    let Err(CommandError::Client(error)) = said else { panic!("{said:?}") };
    let words = told(&error);
    assert!(words.ends_with(r"queue of 64 is full\u{1b}[2J\nerror: none"), "{words}");
    assert_eq!(conversation.turns, []);
}

#[tokio::test]
async fn json_is_one_object_a_turn() {
    let server = Scripted::start(answer("fine"), false).await;
    let client = Client::connect(&server.endpoint).await.unwrap();
    let mut conversation = Conversation::new(&ChatArgs::default());
    let mut bytes = Vec::new();
    let mut writer = TextWriter::new(&mut bytes, false);
    for message in ["one", "two"] {
        say(&client, &mut conversation, message, true, &mut writer, never()).await.unwrap();
    }
    let text = String::from_utf8(bytes).unwrap();
    for line in text.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!((&value["role"], &value["text"]), (&"assistant".into(), &"fine".into()));
        assert_eq!(value["cancelled"], false);
    }
    assert_eq!(text.lines().count(), 2);
}
