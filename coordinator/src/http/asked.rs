//! What a path and a query ask for; what cannot be read of them is answered as every other error.

use axum::extract::{FromRequestParts, Path, Query};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::errors::{ApiError, NO_FIELD};

/// The query of a request, in which each key that is known stands once.
pub(super) struct AskedQuery<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for AskedQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(query)) => Ok(Self(query)),
            Err(rejection) => Err(ApiError::invalid(NO_FIELD, rejection.body_text())),
        }
    }
}

/// What a path names.
pub(super) struct AskedName(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for AskedName {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Self(name)),
            Err(rejection) => Err(ApiError::invalid(NO_FIELD, rejection.body_text())),
        }
    }
}
