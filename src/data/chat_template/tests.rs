use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, vec![("bos_token".into(), "<s>".into())], &Zoned::now()).unwrap()
}

#[test]
fn text_that_is_joined_to_safe_text_is_refused() {
    let messages = [json!({"role": "user", "content": "<a>"})];
    let outcome = |source: &str| template(source).render(&messages, false);
    for source in ["{{ 'x'|safe + messages[0].content }}", "{{ ('x' | safe  + 'y')|upper }}"] {
        let error = format!("{:#}", outcome(source).unwrap_err());
        assert!(error.contains("safe: + behind it"), "{source}: {error}");
    }
    for source in ["{{ messages[0].content|safe ~ '&' }}", "{{ '<a>' + ('&'|safe) }}", "{{ '<a>|safe+&'[:3] ~ '&' }}"] {
        assert_eq!(outcome(source).unwrap().text, "<a>&", "{source}");
    }
}

#[test]
fn tags_that_are_cut_short_are_left_alone() {
    for text in ["{%}", "a{%", "{%}%}", "{%%}", "{% generation", "{%-%}{%+", "%}{%}"] {
        assert_eq!(rewrite_generation(text), (text.to_string(), false));
    }
}

fn golden() -> Vec<serde_json::Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/chat_templates.json");
    serde_json::from_slice(&python::keep_long_integers(&std::fs::read(path).unwrap()).unwrap()).unwrap()
}

#[test]
fn renders_as_transformers_does() {
    let cases = golden();
    assert!(!cases.is_empty());
    for (i, case) in cases.iter().enumerate() {
        let token = |key: &str| (key.to_string(), case[key].as_str().unwrap_or_default().to_string());
        let template = ChatTemplate::new(
            case["template"].as_str().unwrap(),
            vec![token("bos_token"), token("eos_token")],
            &Zoned::now(),
        );
        let add_generation_prompt = case["add_generation_prompt"].as_bool().unwrap();
        let (messages, variables) = (case["messages"].as_array().unwrap(), case["variables"].as_object().unwrap());
        let rendered = template.unwrap().render_with(messages, variables, add_generation_prompt);
        let text = rendered.as_ref().ok().map(|r| r.text.as_str());
        assert_eq!(text, case["rendered"].as_str(), "case {i}, {}", case["name"]);
    }
}

#[test]
fn generation_blocks_keep_whitespace_control() {
    let messages = [json!({"role": "assistant", "content": "é!"})];
    for (source, before, said) in [
        ("a{% generation %}\n  {{ messages[0].content }}{% endgeneration %}\nz", "a", "  é!"),
        ("a\n  {%- generation -%}\n  {{ messages[0].content }}\n  {%- endgeneration -%}\n z", "a", "é!"),
        ("a\n  {% generation %}\n{{ messages[0].content }}\n  {% endgeneration %}\nz", "a\n", "é!\n"),
    ] {
        let template = template(source);
        assert!(template.marks_generation());
        let rendered = template.render(&messages, false).unwrap();
        assert_eq!(rendered.text, format!("{before}{said}z"), "{source:?}");
        assert_eq!(rendered.assistant_spans, vec![before.len()..before.len() + said.len()], "{source:?}");
    }
}

/// Renders one message whose `x` is this JSON.
fn render_x(source: &str, x: &str) -> Result<String> {
    let row = format!("{{\"role\": \"user\", \"x\": {x}}}");
    let message = serde_json::from_slice(&python::keep_long_integers(row.as_bytes())?)?;
    let source = format!("{{% set x = messages[0].x %}}{source}");
    Ok(template(&source).render(&[message], false)?.text)
}

/// The expected texts were printed by transformers 5.24.0 (`render_jinja_template`) with Jinja2 3.1.6 on Python
/// 3.11.
#[test]
fn to_json_is_json_dumps() {
    for (arguments, x, expected) in [
        (
            "",
            r#"{"b": [1, "<ü>"], "a": {}, "n": null, "t": true}"#,
            r#"{"b": [1, "<ü>"], "a": {}, "n": null, "t": true}"#,
        ),
        ("", "[1e-05, 1e-07, 1e+16, 1e20, 100.0, 0.1]", "[1e-05, 1e-07, 1e+16, 1e+20, 100.0, 0.1]"),
        ("", "[12345678901234567890123, -0]", "[12345678901234567890123, 0]"),
        ("", r#""\u0001\b\f\n\r\t\"\\/\u007f""#, "\"\\u0001\\b\\f\\n\\r\\t\\\"\\\\/\u{7f}\""),
        ("(ensure_ascii=true)", "\"ü🦊\u{7f}\"", r#""\u00fc\ud83e\udd8a\u007f""#),
        (
            "(indent=1, ensure_ascii=false)",
            r#"{"b": [1, {}], "a": []}"#,
            "{\n \"b\": [\n  1,\n  {}\n ],\n \"a\": []\n}",
        ),
        ("(indent='--')", "[1]", "[\n--1\n]"),
        ("(indent=none)", "[1, 2]", "[1, 2]"),
        ("(separators=(',', ':'))", r#"{"a": [1, 2]}"#, r#"{"a":[1,2]}"#),
        ("(sort_keys=true)", r#"{"b": 1, "a": 2}"#, r#"{"a": 2, "b": 1}"#),
    ] {
        assert_eq!(render_x(&format!("{{{{ x | tojson{arguments} }}}}"), x).unwrap(), expected, "{arguments} {x}");
    }
    let computed = render_x("{{ {1: x, none: x * 1e308, 2.5: [x][:1]} | tojson }}", "10.5").unwrap();
    assert_eq!(computed, r#"{"1": 10.5, "null": Infinity, "2.5": [10.5]}"#);
    for (source, said) in [("{{ y | tojson }}", "undefined"), ("{{ x | tojson(skipkeys=true) }}", "skipkeys")] {
        let error = format!("{:#}", render_x(source, "1").unwrap_err());
        assert!(error.contains(said), "{error}");
    }
}

/// The expected texts were printed by transformers 5.24.0 (`render_jinja_template`) with Jinja2 3.1.6 on Python
/// 3.11.
#[test]
fn values_print_as_in_python() {
    for (source, x, expected) in [
        ("{{ x }}", "1e20", "1e+20"),
        ("{{ x }} {{ x | string }} {{ '' ~ x }} {{ [x] | join }}", "1e-7", "1e-07 1e-07 1e-07 1e-07"),
        ("{{ x }} {{ x + 1 }}", "12345678901234567890123", "12345678901234567890123 12345678901234567890124"),
        (
            "{{ x }}",
            r#"[true, null, 1.0, 1e-7, "it's", {"a": "b"}]"#,
            r#"[True, None, 1.0, 1e-07, "it's", {'a': 'b'}]"#,
        ),
        ("{{ x / 3e10 }} {{ (x / 3e10) | string }}", "1.0", "3.3333333333333335e-11 3.3333333333333335e-11"),
        ("{{ x is number }} {{ x is float }} {{ x is integer }} {{ x is string }}", "1e-9", "True True False False"),
    ] {
        assert_eq!(render_x(source, x).unwrap(), expected, "{source} {x}");
    }
}

#[test]
fn reasoning_goes_under_its_names() {
    let source = "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}|{{ m.content }}]{% endfor %}";
    let messages = [
        json!({"role": "assistant", "reasoning": "r", "content": null}),
        json!({"role": "assistant", "thinking": "t", "reasoning": "r"}),
        json!({"role": "assistant", "reasoning_content": "c", "thinking": "t", "reasoning": null}),
        json!({"role": "assistant", "content": "a"}),
    ];
    let text = template(source).render(&messages, false).unwrap().text;
    assert_eq!(text, "[r|r|r|][t|t|r|][c|t||][|||a]");
    assert!(template("{{ x.thinking }}").mentions("reasoning") && !template("{{ x }}").mentions("reasoning"));
}

#[test]
fn variables_of_a_row() {
    let source =
        "{% if tools is none %}none{% else %}{{ tools | length }}{% endif %} {{ date_string }} {{ bos_token }}";
    let template = template(source);
    let variables = json!({"tools": [{}, {}], "date_string": "1 May 2025", "bos_token": "<b>"});
    let rendered = template.render_with(&[], variables.as_object().unwrap(), false).unwrap();
    assert_eq!(rendered.text, "2 1 May 2025 <b>");
    assert_eq!(template.render(&[], false).unwrap().text, "none  <s>");
    assert!(template.mentions("date_string") && !template.mentions("date"));
}

#[test]
fn what_is_iterable_is_pythons() {
    let source = "{{ tools is iterable }} {{ nothing is iterable }} {{ messages is iterable }} {{ 1 is iterable }}";
    let rendered = template(source).render(&[], false).unwrap();
    assert_eq!(rendered.text.to_lowercase(), "false true true false");
}

#[test]
fn refusals_say_why() {
    let error = template("{{ raise_exception('no system role') }}").render(&[], false).unwrap_err();
    assert!(format!("{error:#}").contains("no system role"));
    let marked = template("{{ messages[0].content }}").render(&[json!({"content": "\u{FDD0}"})], false);
    assert!(format!("{:#}", marked.unwrap_err()).contains("U+FDD0"));
    let invalid = ChatTemplate::new("{% if %}", Vec::new(), &Zoned::now()).err().unwrap();
    assert!(format!("{invalid:#}").contains("the chat template is not valid"), "{invalid:#}");
}

#[test]
fn special_tokens_and_crlf() {
    let rendered = template("{{ bos_token }}\r\n{% if tools is none %}\r\nx{% endif %}").render(&[], false).unwrap();
    assert_eq!(rendered, Rendered { text: "<s>\nx".into(), assistant_spans: vec![] });
    let year = template("{{ strftime_now('%Y') }}").render(&[], false).unwrap().text;
    assert!(year.parse::<u32>().is_ok_and(|y| y >= 2026), "{year}");
}
