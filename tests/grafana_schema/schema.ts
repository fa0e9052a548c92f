// The types that Grafana publishes, as a dashboard in JSON has them.
import type { Dashboard, Panel as AnyPanel, RowPanel } from "@grafana/schema";
import type * as barchart from "@grafana/schema/dist/esm/raw/composable/barchart/panelcfg/x/BarChartPanelCfg_types.gen";
import type * as bargauge from "@grafana/schema/dist/esm/raw/composable/bargauge/panelcfg/x/BarGaugePanelCfg_types.gen";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as timeseries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

// JSON has the values of enums, and Grafana fills in what is left out.
type Json<T> = T extends string
  ? `${T}`
  : T extends (infer Item)[]
    ? Json<Item>[]
    : T extends object
      ? { [Key in keyof T]?: Json<T[Key]> }
      : T;

type Target = { refId: string; expr: string; legendFormat?: string; instant?: true; range?: false; format?: "table" };
type Config<Custom> = Omit<NonNullable<AnyPanel["fieldConfig"]>, "defaults"> & {
  defaults: Omit<NonNullable<AnyPanel["fieldConfig"]>["defaults"], "custom"> & { custom?: Custom };
};
type Panel<Type extends string, Options, Custom> = Json<Omit<AnyPanel, "type" | "targets" | "options" | "fieldConfig">> & {
  type: Type;
  targets: Target[];
  options: Json<Options>;
  fieldConfig: Json<Config<Custom>>;
};
type Panels =
  | Json<RowPanel>
  | Panel<"barchart", barchart.Options, barchart.FieldConfig>
  | Panel<"bargauge", bargauge.Options, never>
  | Panel<"stat", stat.Options, never>
  | Panel<"table", table.Options, table.FieldConfig>
  | Panel<"timeseries", timeseries.Options, timeseries.FieldConfig>;

export type OurDashboard = Json<Omit<Dashboard, "panels">> & { panels: Panels[] };
