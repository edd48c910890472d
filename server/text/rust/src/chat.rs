//! Chat templates with the conventions of Transformers' `apply_chat_template`.

use std::ffi::CString;
use std::fmt;

use minijinja::value::{from_args, Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use regex::Regex;
use serde_json::Value as Json;

use crate::python;

/// A template stops after this many instructions: fifty times what a chat of 1,000 turns needs.
const FUEL: u64 = 10_000_000;
const NAME: &str = "chat_template";
/// The variable that carries the time to strftime_now; no Jinja name can contain a space.
const NOW: &str = "now unix s";

pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    pub fn new(source: &str) -> Result<Self, String> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_debug(false);
        env.set_formatter(|out, _, value| Ok(out.write_str(&python::str(value)?)?));
        env.set_unknown_method_callback(method);
        env.add_filter("tojson", |value: &Value, args: Kwargs| python::tojson(value, args));
        env.add_filter("string", |value: &Value| python::str(value).map(Value::from));
        env.add_test("sequence", has_items);
        env.add_test("iterable", has_items);
        env.add_test("number", |value: &Value| {
            matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
        });
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception")
                .with_source(Raised(message)))
        });
        env.add_function("strftime_now", strftime_now);
        env.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| explain(&e))?;
        Ok(ChatTemplate { environment: env })
    }

    /// `variables`: (name, JSON) in order; see LkVariable.
    pub fn render(&self, variables: &[(&str, &str)], now_unix_s: i64) -> Result<String, String> {
        let mut all = serde_json::Map::new();
        for (name, json) in variables {
            let shown = if name.is_empty() { "the template's variables" } else { name };
            let value: Json = serde_json::from_str(json)
                .map_err(|e| format!("{shown}: not the JSON that is expected: {e}"))?;
            match value {
                Json::Object(members) if name.is_empty() => all.extend(members),
                _ if name.is_empty() => return Err(format!("{shown}: not a JSON object")),
                value => {
                    all.insert(name.to_string(), value);
                }
            }
        }
        let messages = all.get_mut("messages").and_then(Json::as_array_mut);
        for message in messages.ok_or("messages: not a JSON array of objects")? {
            let members = message.as_object_mut();
            normalise(members.ok_or("messages: not a JSON array of objects")?);
        }
        all.insert(NOW.into(), now_unix_s.into());
        let template = self.environment.get_template(NAME).map_err(|e| explain(&e))?;
        template.render(Value::from_serialize(&all)).map_err(|e| explain(&e))
    }
}

/// What Transformers does to a message before the template sees it: members that are null count as
/// absent, and reasoning is found under each of the names that templates read.
fn normalise(message: &mut serde_json::Map<String, Json>) {
    message.retain(|_, value| !value.is_null());
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| message.get(*name).cloned());
    if let Some(reasoning) = reasoning {
        message.entry("thinking").or_insert_with(|| reasoning.clone());
        message.insert("reasoning_content".into(), reasoning);
    }
}

/// Jinja2's idea of a sequence and of an iterable: a string, a dict and an undefined value too.
fn has_items(value: &Value) -> bool {
    use ValueKind::*;
    matches!(value.kind(), Seq | Iterable | Map | String | Undefined)
}

/// What a template said with raise_exception; kept apart from errors of the template itself.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn explain(error: &Error) -> String {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(raised) = cause.downcast_ref::<Raised>() {
            return format!("the chat template refuses these messages: {raised}");
        }
        message += &format!("; {cause}");
        source = cause.source();
    }
    format!("the chat template failed: {message}")
}

/// `{% generation %}` marks the assistant's text for training; here it only opens a scope.
fn without_generation_tags(source: &str) -> String {
    let tag = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("a valid pattern");
    tag.replace_all(source, "{%$1 ${2}with $3%}").into_owned()
}

fn strftime_now(state: &State, format: String) -> Result<Value, Error> {
    let invalid = || Error::new(ErrorKind::InvalidOperation, "strftime_now: not a usable format");
    let now = state.lookup(NOW).and_then(|v| i64::try_from(v).ok()).ok_or_else(invalid)?;
    let format = CString::new(format).map_err(|_| invalid())?;
    let mut text = [0u8; 512];
    // SAFETY: every pointer is to a live local of the size that is passed.
    let size = unsafe {
        let mut local: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&(now as libc::time_t), &mut local).is_null() {
            return Err(invalid());
        }
        libc::strftime(text.as_mut_ptr().cast(), text.len(), format.as_ptr(), &local)
    };
    Ok(Value::from(String::from_utf8_lossy(&text[..size]).into_owned()))
}

/// Python methods that templates call and minijinja's own list lacks.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let text = value.as_str();
    match (name, text) {
        ("removeprefix", Some(text)) => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        ("removesuffix", Some(text)) => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        ("rsplit", Some(text)) => {
            let (separator, limit): (&str, Option<usize>) = from_args(args)?;
            let limit = limit.map_or(usize::MAX, |n| n.saturating_add(1));
            let mut parts: Vec<&str> = text.rsplitn(limit, separator).collect();
            parts.reverse();
            Ok(Value::from_iter(parts))
        }
        ("partition", Some(text)) => {
            let (separator,): (&str,) = from_args(args)?;
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            let found = if before.len() == text.len() { "" } else { separator };
            Ok(Value::from_iter([before, found, after]))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}
