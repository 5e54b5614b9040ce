//! How many entries a message has, counted in its bytes: nothing is built, and the first list that is
//! too long ends it.

use crate::limits;

/// Why a message is not built.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum TooMany {
    /// A list is too long.
    #[error("{list} may have a length of {limit}, found more")]
    Entries {
        /// Which.
        list: &'static str,
        /// The most that it may have.
        limit: usize,
        /// What was counted when that was clear.
        found: usize,
    },
    /// Bytes that are none.
    #[error("the message is not a protobuf message of this schema")]
    Malformed,
}

/// What fields of a message hold that must be counted. Fields that are not named are passed over.
type Shape = &'static [(u64, Field)];

enum Field {
    /// Messages; their fields are counted as well.
    List(Counted, Shape),
    /// One message with lists in it.
    Part(Shape),
    /// Varints, packed or each in a field of its own.
    Numbers(Counted),
    /// The same of floats, and of what is no message.
    Floats(Counted),
    Texts(Counted),
}

/// The parts of a message may come in pieces, which are joined: so every count goes over the whole
/// message, also where a limit is of one row.
#[derive(Clone, Copy, Debug)]
enum Counted {
    Fields,
    PromptIds,
    Messages,
    Biases,
    Stops,
    StopIds,
    ReceivedIds,
    Stages,
    Held,
    Rows,
    RowTokens,
    RowBlocks,
    ScoreTargets,
    RowBiases,
    TokenCounts,
    EndedSequences,
    StageTimes,
    TopLogprobs,
    Scores,
    EventTokens,
    EventLogprobs,
    Candidates,
    Workers,
    Pipelines,
    StageStatuses,
}

const COUNTED: usize = Counted::StageStatuses as usize + 1;

/// Fields of one message and of all that is in it, unknown ones too: as many ids as a prompt and the
/// part of an answer that a client has may have, each in a field of its own, and room for the rest.
pub(super) const FIELDS: usize = 2 * limits::PROMPT_TOKENS + (64 << 10);

/// The same of the rows of a step: its token counts have three fields each, everything else is less.
const STEP_FIELDS: usize = 3 * STEP_TOKEN_COUNTS + FIELDS;

/// Token counts of all rows of a step: full contexts of distinct tokens for sixteen, or four thousand for
/// every one. A worker has 16 MiB of a step for what is no activation; these take 25.
const STEP_TOKEN_COUNTS: usize = 16 * limits::TOKEN_COUNTS;

/// Blocks that the rows of a step name together: the most for each.
const STEP_BLOCKS: usize = limits::STEP_ROWS * limits::ROW_BLOCKS;

/// Candidates of all tokens of an event: a message of clients holds fewer, for each has a text.
const CANDIDATES: usize = 512 << 10;

/// Workers, pipelines, and stages of all of these in a status: more than any cluster has.
const STATUS_ENTRIES: usize = 64 << 10;

const fn limit(counted: Counted) -> (&'static str, usize) {
    match counted {
        Counted::Fields => ("the request", FIELDS),
        Counted::PromptIds => ("prompt", limits::PROMPT_TOKENS),
        Counted::Messages => ("messages", limits::CHAT_MESSAGES),
        Counted::Biases => ("logit_bias", limits::LOGIT_BIAS),
        Counted::Stops => ("stop", limits::STOP_STRINGS),
        Counted::StopIds => ("stop_token_ids", limits::STOP_TOKENS),
        Counted::ReceivedIds => ("received_ids", limits::PROMPT_TOKENS),
        Counted::Stages => ("stages", limits::STAGES),
        Counted::Held => ("held", limits::HELD_STAGES),
        Counted::Rows => ("rows", limits::STEP_ROWS),
        Counted::RowTokens => ("tokens of the step", limits::STEP_TOKENS),
        Counted::RowBlocks => ("block_ids", STEP_BLOCKS),
        Counted::ScoreTargets => ("score_targets", limits::STEP_TOKENS),
        Counted::RowBiases => ("logit_bias", limits::STEP_ROWS * limits::LOGIT_BIAS),
        Counted::TokenCounts => ("token counts of the step", STEP_TOKEN_COUNTS),
        Counted::EndedSequences => ("ended_sequences", limits::ENDED_SEQUENCES),
        Counted::StageTimes => ("stage_times", limits::STAGES),
        Counted::TopLogprobs => ("top_logprobs", limits::STEP_ROWS * limits::TOP_LOGPROBS as usize),
        Counted::Scores => ("scores", limits::STEP_TOKENS),
        Counted::EventTokens => ("tokens", limits::PROMPT_TOKENS),
        Counted::EventLogprobs => ("logprobs", limits::PROMPT_TOKENS),
        Counted::Candidates => ("top", CANDIDATES),
        Counted::Workers => ("workers", STATUS_ENTRIES),
        Counted::Pipelines => ("pipelines", STATUS_ENTRIES),
        Counted::StageStatuses => ("stages of the pipelines", STATUS_ENTRIES),
    }
}

const PLAIN: Shape = &[];

/// `GenerateRequest`.
const REQUEST: Shape = &[
    (3, Field::Part(&[(1, Field::Numbers(Counted::PromptIds))])),
    (4, Field::Part(&[(1, Field::List(Counted::Messages, PLAIN))])),
    (6, Field::Part(&[(8, Field::List(Counted::Biases, PLAIN))])),
    (7, Field::Texts(Counted::Stops)),
    (8, Field::Numbers(Counted::StopIds)),
    (14, Field::Numbers(Counted::ReceivedIds)),
];

/// `Logprobs`.
const LOGPROBS: Shape = &[(4, Field::List(Counted::Candidates, PLAIN))];

/// `GenerateEvent`.
const EVENT: Shape = &[
    (1, Field::Part(&[(7, Field::List(Counted::EventLogprobs, LOGPROBS))])),
    (
        2,
        Field::Part(&[
            (2, Field::Numbers(Counted::EventTokens)),
            (4, Field::List(Counted::EventLogprobs, LOGPROBS)),
        ]),
    ),
];

/// `StatusResponse`.
const STATUS: Shape = &[
    (6, Field::List(Counted::Workers, PLAIN)),
    (7, Field::List(Counted::Pipelines, &[(4, Field::List(Counted::StageStatuses, PLAIN))])),
];

/// `PrepareRequest`: two bytes of an empty stage are a hundred in memory.
const PREPARE: Shape = &[(9, Field::List(Counted::Stages, PLAIN))];

/// `DescribeResponse`.
const DESCRIPTION: Shape = &[(12, Field::List(Counted::Held, PLAIN))];

/// `SamplingParameters`.
const SAMPLING: Shape = &[
    (10, Field::List(Counted::RowBiases, PLAIN)),
    (11, Field::List(Counted::TokenCounts, PLAIN)),
    (12, Field::List(Counted::TokenCounts, PLAIN)),
];

/// `Row`.
const ROW: Shape = &[
    (4, Field::Numbers(Counted::RowTokens)),
    (7, Field::Numbers(Counted::RowBlocks)),
    (9, Field::Part(SAMPLING)),
    (10, Field::Numbers(Counted::ScoreTargets)),
    (14, Field::Part(&[(3, Field::List(Counted::TopLogprobs, PLAIN))])),
];

/// `RowSet`.
const ROW_SET: Shape = &[
    (1, Field::List(Counted::Rows, ROW)),
    (2, Field::Numbers(Counted::EndedSequences)),
    (3, Field::List(Counted::StageTimes, PLAIN)),
];

/// `ResultSet`.
const RESULT_SET: Shape = &[
    (
        1,
        Field::List(
            Counted::Rows,
            &[(9, Field::List(Counted::TopLogprobs, PLAIN)), (10, Field::Floats(Counted::Scores))],
        ),
    ),
    (2, Field::List(Counted::StageTimes, PLAIN)),
];

/// Counts the entries of a request's lists.
///
/// # Errors
///
/// [`TooMany`]: which list may have how many entries; or that the bytes are no message.
pub(super) fn check_request(message: &[u8]) -> Result<(), TooMany> {
    Counts::within(FIELDS).walk(message, REQUEST)
}

/// The same of an event. Ids that a client takes in may come each in a field of its own, and its
/// candidates have three fields.
pub(super) fn check_event(message: &[u8]) -> Result<(), TooMany> {
    Counts::within(FIELDS + 4 * CANDIDATES).walk(message, EVENT)
}

/// The same of a status.
pub(super) fn check_status(message: &[u8]) -> Result<(), TooMany> {
    Counts::within(32 * STATUS_ENTRIES).walk(message, STATUS)
}

/// The same of the stages of a plan.
pub(super) fn check_stages(message: &[u8]) -> Result<(), TooMany> {
    Counts::within(FIELDS).walk(message, PREPARE)
}

/// The same of what a worker holds.
pub(super) fn check_description(message: &[u8]) -> Result<(), TooMany> {
    Counts::within(FIELDS).walk(message, DESCRIPTION)
}

/// The same of the rows of a step.
pub(crate) fn check_row_set(message: &[u8]) -> Result<(), TooMany> {
    Counts::within(STEP_FIELDS).walk(message, ROW_SET)
}

/// The same of the rows of a result.
pub(crate) fn check_result_set(message: &[u8]) -> Result<(), TooMany> {
    Counts::within(FIELDS).walk(message, RESULT_SET)
}

/// What was counted so far.
struct Counts {
    found: [usize; COUNTED],
    fields: usize,
}

impl Counts {
    fn within(fields: usize) -> Self {
        Self { found: [0; COUNTED], fields }
    }

    fn add(&mut self, counted: Counted, more: usize) -> Result<(), TooMany> {
        let (list, limit) = match counted {
            Counted::Fields => (limit(counted).0, self.fields),
            _ => limit(counted),
        };
        let found = &mut self.found[counted as usize];
        *found = found.saturating_add(more);
        match *found <= limit {
            true => Ok(()),
            false => Err(TooMany::Entries { list, limit, found: *found }),
        }
    }

    /// Visits every field of one message. As deep as `shape` is.
    fn walk(&mut self, message: &[u8], shape: Shape) -> Result<(), TooMany> {
        let mut rest = message;
        while !rest.is_empty() {
            self.add(Counted::Fields, 1)?;
            let (number, value) = field(&mut rest).ok_or(TooMany::Malformed)?;
            let Some((_, field)) = shape.iter().find(|(known, _)| *known == number) else {
                continue;
            };
            match (field, value) {
                (Field::List(counted, shape), Value::Bytes(entry)) => {
                    self.add(*counted, 1)?;
                    self.walk(entry, shape)?;
                }
                (Field::Part(shape), Value::Bytes(part)) => self.walk(part, shape)?,
                // Every varint ends with a byte whose high bit is clear.
                (Field::Numbers(counted), Value::Bytes(packed)) => {
                    self.add(*counted, packed.iter().filter(|byte| **byte < 0x80).count())?;
                }
                (Field::Floats(counted), Value::Bytes(packed)) => {
                    self.add(*counted, packed.len().div_ceil(size_of::<f32>()))?;
                }
                (
                    Field::Numbers(counted) | Field::Floats(counted) | Field::Texts(counted),
                    Value::Other | Value::Bytes(_),
                ) => self.add(*counted, 1)?,
                // Of another type than the schema says: it is not built.
                (Field::List(..) | Field::Part(_), Value::Other) => {}
            }
        }
        Ok(())
    }
}

/// The value of a field, as far as the wire tells.
#[derive(Clone, Copy)]
enum Value<'m> {
    Bytes(&'m [u8]),
    Other,
}

/// The next field's number and value; `None` if there is none.
fn field<'m>(rest: &mut &'m [u8]) -> Option<(u64, Value<'m>)> {
    let key = varint(rest)?;
    let value = match key & 7 {
        0 => varint(rest).map(|_| Value::Other),
        1 => take(rest, 8).map(|_| Value::Other),
        2 => {
            let length = varint(rest).and_then(|length| usize::try_from(length).ok());
            length.and_then(|length| take(rest, length)).map(Value::Bytes)
        }
        5 => take(rest, 4).map(|_| Value::Other),
        // Groups, which the schema has none of.
        _ => None,
    };
    Some((key >> 3, value?))
}

fn take<'m>(rest: &mut &'m [u8], bytes: usize) -> Option<&'m [u8]> {
    let (taken, left) = rest.split_at_checked(bytes)?;
    *rest = left;
    Some(taken)
}

/// A varint of at most ten bytes.
fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, left) = rest.split_first()?;
        *rest = left;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use prost::Message;
    use prost_types::DescriptorProto;
    use prost_types::field_descriptor_proto::{Label, Type};

    use super::*;

    /// Whether `shape` counts every list that is in a message, at every depth.
    fn check(name: &str, shape: Shape, schema: &HashMap<String, DescriptorProto>) {
        for field in &schema[name].field {
            let known = shape.iter().find(|(number, _)| *number == field.number() as u64);
            if field.label() == Label::Repeated {
                assert!(known.is_some(), "{name}.{} is not counted", field.name());
            }
            if field.r#type() == Type::Message {
                let inner = match known {
                    Some((_, Field::List(_, shape) | Field::Part(shape))) => *shape,
                    _ => PLAIN,
                };
                check(field.type_name(), inner, schema);
            }
        }
    }

    #[test]
    fn every_list_of_the_schema_is_counted() {
        let files = prost_types::FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap();
        let messages = files.file.iter().flat_map(|file| &file.message_type);
        let schema: HashMap<String, DescriptorProto> = messages
            .map(|message| (format!(".tercet.v1.{}", message.name()), message.clone()))
            .collect();
        // The first two travel as bytes of another message.
        let walked: [(&str, Shape); 7] = [
            ("RowSet", ROW_SET),
            ("ResultSet", RESULT_SET),
            ("GenerateRequest", REQUEST),
            ("GenerateEvent", EVENT),
            ("StatusResponse", STATUS),
            ("PrepareRequest", PREPARE),
            ("DescribeResponse", DESCRIPTION),
        ];
        for (name, shape) in walked {
            check(&format!(".tercet.v1.{name}"), shape, &schema);
        }
        let services = files.file.iter().flat_map(|file| &file.service);
        for method in services.flat_map(|service| &service.method) {
            for name in [method.input_type(), method.output_type()] {
                if !walked.iter().any(|(walked, _)| name.ends_with(&format!(".{walked}"))) {
                    check(name, PLAIN, &schema);
                }
            }
        }
    }
}
