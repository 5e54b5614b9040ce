//! Flags that describe an answer, shared by `generate` and `chat`.

use node::config::{Duration, UnitError};
use proto::generate::{Priority, Sampling};

/// How tokens are drawn and when the answer ends.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct AnswerArgs {
    /// Most tokens of the answer [default: the model's own, or as many as the context allows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// 0 takes the most probable token, larger is more varied [default: the model's own, as
    /// `tercet model show` names it, or 1]
    #[arg(long, value_name = "T", value_parser = at_least_zero)]
    pub temperature: Option<f32>,
    /// Draw from the K most probable tokens; 0 is off [default: the model's own, or 0]
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Draw from the fewest tokens that together have this probability; 1 is off [default: the
    /// model's own, or 1]
    #[arg(long, value_name = "P", value_parser = share_above_zero)]
    pub top_p: Option<f32>,
    /// Drop tokens less probable than this share of the best one's; 0 is off [default: the model's
    /// own, or 0]
    #[arg(long, value_name = "P", value_parser = share)]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens seen so far; 1 is off [default: the model's own, or 1]
    #[arg(long, value_name = "X", value_parser = above_zero)]
    pub repetition_penalty: Option<f32>,
    /// Taken once from the logit of every token of the answer; 0 is off
    #[arg(long, value_name = "X", value_parser = finite, allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Taken from a token's logit for each time the answer has it; 0 is off
    #[arg(long, value_name = "X", value_parser = finite, allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Key of the draws: the same seed gives the same answer
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Give up when the answer is not whole after this time, such as 30s [default: the server's]
    #[arg(long, value_name = "TIME", value_parser = timeout)]
    pub timeout: Option<Duration>,
    /// Go on past the model's end tokens
    #[arg(long)]
    pub ignore_eos: bool,
    /// Let everybody go first who waits for an answer: take what they leave
    #[arg(long)]
    pub batch: bool,
    /// Who asks, for fair shares between callers and the prefix cache [default: this machine]
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
}

impl AnswerArgs {
    /// From the request to the last token, in milliseconds; 0 is the server's limit.
    pub fn deadline_ms(&self) -> u32 {
        let millis = self.timeout.map_or(0, |timeout| timeout.get().as_millis());
        u32::try_from(millis).unwrap_or(u32::MAX)
    }

    /// Whose turn it is when not all can be served.
    pub fn priority(&self) -> Priority {
        if self.batch { Priority::Batch } else { Priority::Interactive }
    }

    /// The part of a request that is about drawing.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: Vec::new(),
        }
    }
}

/// For clap: a time of at least a millisecond, which is what a request can say.
fn timeout(text: &str) -> Result<Duration, String> {
    let time: Duration = text.parse().map_err(|error: UnitError| error.to_string())?;
    match time.get().as_millis() {
        0 => Err("must be a time of at least 1ms".to_owned()),
        1..=0xffff_ffff => Ok(time),
        _ => Err("must be at most 49 days".to_owned()),
    }
}

fn number(text: &str, ok: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && ok(value) => Ok(value),
        _ => Err(format!("must be {expected}")),
    }
}

fn finite(text: &str) -> Result<f32, String> {
    number(text, |_| true, "a number")
}

/// For clap.
///
/// # Errors
///
/// What was expected, if it is no number of at least 0.
pub fn at_least_zero(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "a number of at least 0")
}

fn above_zero(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0, "a number above 0")
}

fn share(text: &str) -> Result<f32, String> {
    number(text, |value| (0.0..=1.0).contains(&value), "a number from 0 to 1")
}

/// For clap.
///
/// # Errors
///
/// What was expected, if it is no number above 0 and at most 1.
pub fn share_above_zero(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "a number above 0 and at most 1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        answer: AnswerArgs,
    }

    fn parse(flags: &[&str]) -> Result<AnswerArgs, clap::Error> {
        Line::try_parse_from(["test"].iter().chain(flags)).map(|line| line.answer)
    }

    #[test]
    fn every_flag_reaches_the_request() {
        let flags = "--max-tokens 5 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 \
             --repetition-penalty 1.1 --presence-penalty -0.2 --frequency-penalty 0.3 --seed 7 \
             --stop a --stop b --ignore-eos";
        let args = parse(&flags.split_whitespace().collect::<Vec<_>>()).unwrap();
        let want = Sampling {
            temperature: Some(0.5),
            top_k: Some(4),
            top_p: Some(0.9),
            min_p: Some(0.1),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(-0.2),
            frequency_penalty: Some(0.3),
            logit_bias: vec![],
        };
        assert_eq!(args.sampling(), want);
        assert_eq!((args.max_tokens, args.seed, args.ignore_eos), (Some(5), Some(7), true));
        assert_eq!(args.stop, ["a", "b"]);
    }

    #[test]
    fn without_flags_the_server_decides() {
        assert_eq!(parse(&[]).unwrap().sampling(), Sampling::default());
    }

    #[test]
    fn a_time_limit_reaches_the_request() {
        let limit = |flags: &[&str]| parse(flags).unwrap().deadline_ms();
        assert_eq!(limit(&[]), 0, "the server's");
        assert_eq!(limit(&["--timeout", "1500ms"]), 1500);
        assert_eq!(limit(&["--timeout", "2m"]), 120_000);
    }

    #[test]
    fn numbers_out_of_range_are_usage_errors() {
        for (flag, value) in [
            ("--max-tokens", "0"),
            ("--temperature", "-0.1"),
            ("--temperature", "inf"),
            ("--temperature", "NaN"),
            ("--top-k", "-1"),
            ("--top-p", "0"),
            ("--top-p", "1.5"),
            ("--min-p", "2"),
            ("--repetition-penalty", "0"),
            ("--presence-penalty", "x"),
            ("--seed", "-1"),
            ("--timeout", "0s"),
            ("--timeout", "999us"),
            ("--timeout", "50d"),
            ("--timeout", "soon"),
        ] {
            assert!(parse(&[&format!("{flag}={value}")]).is_err(), "{flag} {value}");
        }
    }
}
