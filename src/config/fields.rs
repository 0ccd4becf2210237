//! Typed, bounded access to a JSON object's fields, remembering which ones were asked for.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// No dimension of a model is larger; products of two such fit 64 bits with room to spare.
pub(super) const LARGEST: usize = 1 << 24;

/// The fields of one JSON object. Asking for a field marks it as understood; [`Fields::unread`] lists the others.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    file: &'a Path,
    /// Where the object stands, for messages: `""` or `"rope_scaling."`.
    prefix: &'a str,
    read: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, file: &'a Path, prefix: &'a str) -> Fields<'a> {
        Fields { map, file, prefix, read: RefCell::default() }
    }

    /// The fields of the object in field `name`, if there is one.
    pub(super) fn object(&self, name: &'a str, prefix: &'a str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields::new(map, self.file, prefix))),
            Some(other) => Err(self.wrong(name, "an object", other)),
        }
    }

    /// An error about field `name`.
    pub(super) fn error(&self, name: &str, what: impl Into<String>) -> Error {
        Error::Config { file: self.file.into(), field: format!("{}{name}", self.prefix), what: what.into() }
    }

    fn wrong(&self, name: &str, wanted: &str, value: &Value) -> Error {
        self.error(name, format!("is {}, should be {wanted}", shown(value)))
    }

    /// Fields that nothing asked for, with their values.
    pub(super) fn unread(&self) -> Vec<(&'a str, &'a Value)> {
        let read = self.read.borrow();
        self.map.iter().filter(|(k, _)| !read.contains(*k)).map(|(k, v)| (k.as_str(), v)).collect()
    }

    /// The value as written, `null` included.
    pub(super) fn written(&self, name: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(name.into());
        self.map.get(name)
    }

    /// The value, when there is one other than `null`.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.written(name).filter(|value| !value.is_null())
    }

    /// Whether the field is written as `null`.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.written(name).is_some_and(Value::is_null)
    }

    /// A whole number within `range`.
    pub(super) fn integer(&self, name: &str, least: usize, most: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
            Some(v) if (least..=most).contains(&v) => Ok(Some(v)),
            _ => Err(self.wrong(name, &format!("a whole number from {least} to {most}"), value)),
        }
    }

    /// A dimension, 1 to [`LARGEST`].
    pub(super) fn size(&self, name: &str) -> Result<Option<usize>> {
        self.integer(name, 1, LARGEST)
    }

    /// A dimension that must be there.
    pub(super) fn required(&self, name: &str) -> Result<usize> {
        self.size(name)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// A finite number.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(v) if v.is_finite() => Ok(Some(v)),
            _ => Err(self.wrong(name, "a number", value)),
        }
    }

    /// A number above zero.
    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>> {
        match self.number(name)? {
            Some(v) if v <= 0.0 => Err(self.error(name, format!("is {v}, should be above 0"))),
            v => Ok(v),
        }
    }

    /// true or false.
    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(self.wrong(name, "true or false", other)),
        }
    }

    /// A string.
    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong(name, "a string", other)),
        }
    }

    /// A list.
    pub(super) fn list(&self, name: &str) -> Result<Option<&'a [Value]>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong(name, "a list", other)),
        }
    }

    /// One token id, several, or none.
    pub(super) fn tokens(&self, name: &str) -> Result<Option<Vec<u32>>> {
        let id = |value: &Value| value.as_u64().and_then(|v| u32::try_from(v).ok());
        let Some(value) = self.get(name) else { return Ok(None) };
        let ids = match value {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<u32>>>(),
            one => id(one).map(|v| vec![v]),
        };
        ids.map(Some).ok_or_else(|| self.wrong(name, "a token id or a list of them", value))
    }

    /// Refuses a product of dimensions beyond what buffers are indexed with.
    pub(super) fn fits(&self, name: &str, factors: &[usize]) -> Result<()> {
        let product = factors.iter().try_fold(1usize, |p, &f| p.checked_mul(f)).filter(|&p| p <= i32::MAX as usize);
        product.map(|_| ()).ok_or_else(|| {
            self.error(name, format!("makes a width of {factors:?} multiplied, more than {} elements", i32::MAX))
        })
    }
}

/// A value for a message: not more than a line of it.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
