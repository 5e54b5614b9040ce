//! `/v1/models`: the one model that is served.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::Api;
use super::errors::ApiError;
use crate::request::{RequestError, ServedModel};

/// All models.
pub(super) async fn list(State(api): State<Api>) -> Json<Value> {
    let data = [describe(&api.service.model)];
    // Without `has_more` OpenAI's own clients ask for page after page.
    Json(json!({ "object": "list", "data": data, "has_more": false }))
}

/// One model, by name or id; slashes in the name may come raw or encoded.
pub(super) async fn retrieve(
    State(api): State<Api>,
    Path(asked): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = &api.service.model;
    if asked == model.name || asked == model.id {
        return Ok(Json(describe(model)));
    }
    let asked = asked.chars().take(proto::limits::NAME_BYTES).collect();
    Err(RequestError::UnknownModel { model: asked, served: model.name.clone() }.into())
}

fn describe(model: &ServedModel) -> Value {
    json!({
        "id": model.name,
        "object": "model",
        "created": model.created_unix_s,
        "owned_by": "tercet",
        "root": model.id,
        "max_model_len": model.context,
    })
}
