//! Chat templates by transformers' conventions: the same Jinja dialect, functions and variables, bounded in work and
//! output.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error as JinjaError, ErrorKind, context};

use crate::error::{Error, Result};

/// A checkpoint's chat template.
pub struct Template {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the like, as texts.
    special: BTreeMap<String, String>,
}

/// What a template is given of a message.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: String,
    /// What is said.
    pub content: String,
    /// The speaker's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Bounds of a rendering.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Template instructions.
    pub work: u64,
    /// Bytes written.
    pub bytes: usize,
}

impl Template {
    /// The template of the checkpoint in `directory`: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (a text, or a list of which `default` is taken). `None` where there is none.
    pub fn load(directory: &Path) -> Result<Option<Template>> {
        let file = directory.join("tokenizer_config.json");
        let config: serde_json::Value = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::checkpoint(&file, format!("is not valid JSON: {e}")))?,
            Err(_) => serde_json::Value::Null,
        };
        let jinja = directory.join("chat_template.jinja");
        let (file, source) = match std::fs::read_to_string(&jinja) {
            Ok(source) => (jinja, source),
            Err(_) => match &config["chat_template"] {
                serde_json::Value::String(source) => (file, source.clone()),
                serde_json::Value::Array(named) => {
                    let default = named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
                    match default {
                        Some(source) => (file, source.to_string()),
                        None => return Err(Error::checkpoint(file, "has chat templates but none named 'default'")),
                    }
                }
                _ => return Ok(None),
            },
        };
        let special = config.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"));
        let text = |v: &serde_json::Value| v.as_str().or(v["content"].as_str()).map(str::to_string);
        let special = special.filter_map(|(name, v)| Some((name.clone(), text(v)?))).collect();
        Template::new(source, special)
            .map(Some)
            .map_err(|e| Error::checkpoint(file, format!("the chat template does not parse: {e:#}")))
    }

    fn new(source: String, special: BTreeMap<String, String>) -> std::result::Result<Template, JinjaError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |what: String| -> std::result::Result<Value, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, what))
        });
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", without_generation(source))?;
        Ok(Template { environment, special })
    }

    /// The conversation as the model was trained to read it.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &BTreeMap<String, serde_json::Value>,
        bounds: Bounds,
    ) -> Result<String> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(bounds.work));
        let refuse = |e: JinjaError| {
            let what = match e.kind() {
                ErrorKind::OutOfFuel => "it takes too much work".to_string(),
                // raise_exception's text alone; positions in the template help nobody who sends messages.
                ErrorKind::InvalidOperation => e.detail().unwrap_or("it refused the messages").to_string(),
                _ => format!("{e:#}"),
            };
            Error::Request(format!("the chat template: {what}"))
        };
        let template = environment.get_template("chat").map_err(refuse)?;
        let mut out = Bounded { bytes: vec![], most: bounds.bytes };
        let mut merged: BTreeMap<&str, Value> =
            self.special.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))).collect();
        merged.extend(extra.iter().map(|(name, v)| (name.as_str(), Value::from_serialize(v))));
        let variables = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            tools => Value::from(()),
            documents => Value::from(()),
            ..Value::from_serialize(merged)
        };
        match template.render_captured_to(variables, &mut out) {
            Ok(_) => String::from_utf8(out.bytes).map_err(|e| Error::Internal(format!("chat template: {e}"))),
            Err(e) if e.kind() == ErrorKind::WriteFailure => {
                Err(Error::Request(format!("the chat template: it writes more than {} bytes", bounds.bytes)))
            }
            Err(e) => Err(refuse(e)),
        }
    }
}

/// `{% generation %}` blocks mark what a trainer learns from; here they are an `if true`.
fn without_generation(source: String) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = &source[..];
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|i| open + i) else { break };
        let inside = &rest[open + 2..close];
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let instead = match word {
            "generation" => inside.replace(word, "if true"),
            "endgeneration" => inside.replace(word, "endif"),
            _ => inside.to_string(),
        };
        out.push_str(&rest[..open + 2]);
        out.push_str(&instead);
        out.push_str("%}");
        rest = &rest[close + 2..];
    }
    out + rest
}

/// A writer that fails beyond a bound.
struct Bounded {
    bytes: Vec<u8>,
    most: usize,
}

impl std::io::Write for Bounded {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + part.len() > self.most {
            return Err(std::io::Error::other("too long"));
        }
        self.bytes.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The present time by strftime's directives that templates use.
pub fn strftime_now(format: &str) -> String {
    let seconds = super::now() as i64;
    let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // The civil calendar from days since 1970, in eras of 400 years that begin in March.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day = z.rem_euclid(146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let march = (5 * of_year + 2) / 153;
    let (d, m) = (of_year - (153 * march + 2) / 5 + 1, if march < 10 { march + 3 } else { march - 9 });
    let y = year + era * 400 + i64::from(m <= 2);
    let months = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let weekdays = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (month, weekday) = (months[(m - 1) as usize], weekdays[days.rem_euclid(7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&y.to_string()),
            Some('m') => out.push_str(&format!("{m:02}")),
            Some('d') => out.push_str(&format!("{d:02}")),
            Some('B') => out.push_str(month),
            Some('b') => out.push_str(&month[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H') => out.push_str(&format!("{:02}", time / 3600)),
            Some('M') => out.push_str(&format!("{:02}", time / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", time % 60)),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it: a space after commas and colons.
fn to_json(value: &Value, options: Kwargs) -> std::result::Result<Value, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    // Python's other keywords change nothing that a prompt would show.
    let _: (Option<bool>, Option<bool>) = (options.get("ensure_ascii")?, options.get("sort_keys")?);
    let bad = |e: serde_json::Error| JinjaError::new(ErrorKind::BadSerialization, e.to_string());
    let mut out = vec![];
    if let Some(indent) = indent {
        let spaces = " ".repeat(indent.min(16));
        let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
        let mut writer = serde_json::Serializer::with_formatter(&mut out, formatter);
        serde::Serialize::serialize(value, &mut writer).map_err(bad)?;
    } else {
        let mut writer = serde_json::Serializer::with_formatter(&mut out, Spaced);
        serde::Serialize::serialize(value, &mut writer).map_err(bad)?;
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Bounds = Bounds { work: 100_000, bytes: 10_000 };

    fn render(source: &str, messages: &[(&str, &str)], bounds: Bounds) -> Result<String> {
        let special = BTreeMap::from([("bos_token".to_string(), "<s>".to_string())]);
        let messages: Vec<_> =
            messages.iter().map(|(r, c)| Message { role: r.to_string(), content: c.to_string(), name: None }).collect();
        let extra = BTreeMap::from([("enable_thinking".to_string(), serde_json::json!(false))]);
        Template::new(source.into(), special).unwrap().render(&messages, true, &extra, bounds)
    }

    #[test]
    fn transformers_conventions_hold() {
        let source = "{{ bos_token }}{% for m in messages %}\n    {% if m['role'].startswith('u') %}\n\
                      <|{{ m.role }}|>{{ m['content'].strip() | trim }}{% endif %}\n{% endfor %}\n\
                      {%- if add_generation_prompt and not enable_thinking %}<|assistant|>{% endif %}";
        assert_eq!(render(source, &[("user", " hi ")], ALL).unwrap(), "<s><|user|>hi<|assistant|>");
        let json = "{{ {'b': 'é<', 'a': [1, 2]} | tojson }}{{ messages | tojson }}";
        let want = r#"{"b": "é<", "a": [1, 2]}[{"role": "user", "content": "x"}]"#;
        assert_eq!(render(json, &[("user", "x")], ALL).unwrap(), want);
        let train = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
        assert_eq!(render(train, &[("user", "x")], ALL).unwrap(), "x");
        let year = render("{{ strftime_now('%Y-%m-%d') }}", &[], ALL).unwrap();
        assert!(year.len() == 10 && year.starts_with("20"), "{year}");
        let loops = "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}";
        assert_eq!(render(loops, &[("user", "a"), ("user", "b")], ALL).unwrap(), "a");
    }

    #[test]
    fn a_refusal_carries_the_templates_words() {
        let source = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}";
        let error = render(source, &[("system", "")], ALL).unwrap_err().to_string();
        assert_eq!(error, "the chat template: roles must alternate");
    }

    #[test]
    fn work_and_output_are_bounded() {
        let endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}";
        assert!(render(endless, &[], ALL).unwrap_err().to_string().contains("work"));
        let exact = Bounds { bytes: 4, ..ALL };
        assert_eq!(render("{{ messages[0].content }}", &[("user", "four")], exact).unwrap(), "four");
        let error = render("{{ messages[0].content }}", &[("user", "fives")], exact).unwrap_err();
        assert!(error.to_string().contains("more than 4 bytes"));
    }
}
