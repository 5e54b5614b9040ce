//! The question that a running coordinator's planner would be asked, as it is told by that coordinator.

use coordinator::planner::{Incumbent, Problem};

use super::nodes::WORKERS_MAX;

/// Why a question is none that can be planned for here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LiveError {
    /// It is of another version.
    #[error(
        "the coordinator's question is none that this version understands: use the `tercet` of its \
         version (`tercet status --json` says which)"
    )]
    Parse(#[from] serde_json::Error),
    /// It says what no coordinator asks.
    #[error("the coordinator's question makes no sense: {what}")]
    Wrong { what: &'static str },
}

/// The question, checked: the planner takes it that what is asked can be.
pub(super) fn problem(text: &str) -> Result<Problem, LiveError> {
    let problem: Problem = serde_json::from_str(text)?;
    let wrong = |what| Err(LiveError::Wrong { what });
    let Problem { model, workers, options } = &problem;
    if model.layers == 0 || model.layer_bytes == 0 || model.layers > LAYERS_MAX {
        return wrong("a model has layers with weights");
    }
    if workers.len() > WORKERS_MAX {
        return wrong("there are too many workers");
    }
    let timed = workers.iter().flat_map(|worker| &worker.steps);
    if timed.clone().any(|step| step.rows == 0 || step.layer_ns == 0) {
        return wrong("a step has rows and takes time");
    }
    let whole = |incumbent: &Incumbent| {
        let mut begin = 0;
        let stages = &incumbent.stages;
        stages.iter().all(|stage| {
            let follows = stage.layers.start == begin && stage.layers.end > begin;
            begin = stage.layers.end;
            follows
        }) && begin == model.layers
    };
    if !options.incumbent.iter().all(whole) {
        return wrong("a pipeline that serves has every layer once");
    }
    if options.min_kv_blocks == 0 || options.context_tokens == 0 {
        return wrong("a pipeline has room for somebody");
    }
    Ok(problem)
}

/// Layers of the largest model that can be: no known one has half as many.
const LAYERS_MAX: u32 = proto::limits::STAGES as u32;

#[cfg(test)]
mod tests {
    use coordinator::planner::{ModelCosts, Options, Stage, StepTime, WorkerSpec};

    use super::*;

    fn asked() -> Problem {
        let stage = Stage { worker: "a".into(), layers: 0..4 };
        let worker = |id: &str| WorkerSpec {
            id: id.into(),
            machine: String::new(),
            rack: String::new(),
            memory_bytes: 1 << 30,
            steps: vec![StepTime { rows: 1, layer_ns: 1000, head_ns: 0 }],
        };
        Problem {
            model: ModelCosts {
                layers: 4,
                layer_bytes: 100,
                embedding_bytes: 0,
                head_bytes: 0,
                tied_head: false,
                kv_block_layer_bytes: 1,
            },
            workers: vec![worker("a"), worker("b")],
            options: Options {
                min_kv_blocks: 1,
                max_kv_blocks: 8,
                context_tokens: 64,
                incumbent: vec![Incumbent { stages: vec![stage], kv_blocks: 8 }],
                ..Options::default()
            },
        }
    }

    #[test]
    fn what_a_coordinator_asks_is_read_and_what_none_would_ask_is_refused() {
        let text = serde_json::to_string(&asked()).unwrap();
        assert_eq!(problem(&text).unwrap(), asked());
        let refused = |change: &dyn Fn(&mut Problem)| {
            let mut asked = asked();
            change(&mut asked);
            problem(&serde_json::to_string(&asked).unwrap()).unwrap_err().to_string()
        };
        for (change, want) in [
            (&(|p: &mut Problem| p.model.layers = 0) as &dyn Fn(&mut Problem), "has layers"),
            (&|p| p.workers[0].steps[0].rows = 0, "has rows"),
            (&|p| p.options.incumbent[0].stages[0].layers = 0..3, "every layer once"),
            (&|p| p.options.incumbent[0].stages.clear(), "every layer once"),
            (&|p| p.options.min_kv_blocks = 0, "room for somebody"),
            (&|p| p.workers = vec![p.workers[0].clone(); WORKERS_MAX + 1], "too many workers"),
        ] {
            assert!(refused(change).contains(want), "{}", refused(change));
        }
        for text in ["", "{}", "[]", "{\"model\":7}"] {
            assert!(problem(text).unwrap_err().to_string().contains("of its version"), "{text}");
        }
    }

    #[test]
    fn the_plan_of_a_live_cluster_changes_as_if_it_came_to_that() {
        let changes = |text: &str| -> Vec<super::super::Change> {
            text.split(',').map(|change| change.parse().unwrap()).collect()
        };
        let shown = super::super::live_what_if(asked(), &changes("remove:b,add:c=a")).unwrap();
        assert_eq!(shown.pipelines.len(), 2, "{}", shown.text());
        let served = shown.before_tokens_per_s.unwrap();
        assert!(served > 0.0 && shown.tokens_per_s > 1.5 * served, "{}", shown.text());
        let gone = super::super::live_what_if(asked(), &changes("remove:z")).unwrap_err();
        assert!(gone.to_string().contains("there is no node \"z\""), "{gone}");
    }
}
