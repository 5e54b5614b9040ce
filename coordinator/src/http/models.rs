//! `/v1/models`: the one model that is served.

use axum::Json;
use axum::extract::State;
use proto::status::SamplingStatus;
use serde::Serialize;

use super::Api;
use super::asked::AskedName;
use super::errors::ApiError;
use crate::request::{RequestError, ServedModel};

/// One model, as OpenAI describes it and with what vLLM adds.
#[derive(Serialize)]
pub(super) struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    max_model_len: u32,
    /// Our own: what is in force for requests that do not say.
    sampling_defaults: SamplingStatus,
}

/// All of them.
#[derive(Serialize)]
pub(super) struct Models {
    object: &'static str,
    data: [Model; 1],
    /// Without it OpenAI's own clients ask for page after page.
    has_more: bool,
}

/// All models.
pub(super) async fn list(State(api): State<Api>) -> Json<Models> {
    let data = [describe(&api.service.model)];
    Json(Models { object: "list", data, has_more: false })
}

/// One model, by name or id; slashes in the name may come raw or encoded.
pub(super) async fn retrieve(
    State(api): State<Api>,
    AskedName(asked): AskedName,
) -> Result<Json<Model>, ApiError> {
    let model = &api.service.model;
    if asked == model.name || asked == model.id {
        return Ok(Json(describe(model)));
    }
    let asked = asked.chars().take(proto::limits::NAME_BYTES).collect();
    Err(RequestError::UnknownModel { model: asked, served: model.name.clone() }.into())
}

fn describe(model: &ServedModel) -> Model {
    Model {
        id: model.name.clone(),
        object: "model",
        created: model.created_unix_s,
        owned_by: "tercet",
        root: model.id.clone(),
        max_model_len: model.context,
        sampling_defaults: model.sampling_status(),
    }
}
